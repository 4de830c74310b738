"""The web page at /: its files, and what a browser may do with them."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""The types of files, which a computer's own list may have wrong."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
"""The page loads its own files, speaks with its own server, and never makes code or markup of a text."""


def routes() -> list[Route]:
    """Return a route for each file of the page. The first is the page itself."""
    names = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _TYPES)
    return [Route("/", _send), *(Route(f"/{name}", _send) for name in names)]


async def _send(request: Request) -> Response:
    """Send a file of the page."""
    path = _FOLDER / (request.url.path.rpartition("/")[2] or "index.html")
    return FileResponse(path, headers=_HEADERS, media_type=_TYPES[path.suffix])
