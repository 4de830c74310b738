"""The command `rwkv pull`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rwkv_cli.commands.options import quant_option
from rwkv_cli.errors import RwkvError, pasted
from rwkv_cli.terminal.compiling import load_kernels
from rwkv_cli.terminal.converting import byte_bar, converting_bar
from rwkv_cli.terminal.output import columns, note, one_line

if TYPE_CHECKING:
    from rwkv_cli.engine.pulling import Choice, Repository


@click.command("pull")
@click.argument("source", metavar="REPO[/FILE]")
@quant_option
@click.option("--keep", is_flag=True, help="Keep the checkpoint, too, in downloads/ of the models folder.")
def command(source: str, quant: str, keep: bool) -> None:
    """Download a checkpoint from Hugging Face's hub, and convert it into the models folder. It prints the model's name.

    REPO is OWNER/NAME. If it has several checkpoints, they are listed, and FILE names one. A download that was cut goes
    on where it stopped, and its hash is checked. $HF_ENDPOINT names another hub or a mirror, and $HF_TOKEN opens what
    is private or gated.

    \b
    rwkv pull BlinkDL/rwkv7-g1
    rwkv pull BlinkDL/rwkv-7-world/RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth
    """
    try:
        from rwkv_cli.engine import pulling
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("huggingface_hub"):
            raise
        raise click.ClickException(
            'rwkv pull needs huggingface-hub; install it with: pip install "rwkv-cli[pull]"'
        ) from None
    import logging

    from rwkv_cli.engine import library
    from rwkv_cli.engine.named import convert_into

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would write about each try
    name, file = pulling.split(source)
    repository = pulling.open_repository(name)
    choice = repository.choice(file) if file is not None else _only(repository)
    origin = repository.origin(choice, quant)
    known = library.made_from(origin)
    if known is not None and library.is_current(known, origin):
        note(f"{one_line(choice.name)} is there already.")
        click.echo(one_line(library.name_of(known)))
        return
    note(f"Downloading {one_line(choice.name)}: {choice.size / 1e6:,.1f} MB")
    path = pulling.download(repository, choice, byte_bar("Downloading"), byte_bar("Checking"))
    try:
        model = convert_into(path, origin, converting_bar, load_kernels)
    except (RwkvError, OSError):
        note(f"The download is kept: {one_line(path)}")
        raise
    if keep:
        note(f"The checkpoint is kept: {one_line(path)}")
    else:
        pulling.remove(repository, choice)
    made = library.name_of(model)
    note(f"To chat with it: {one_line(pasted('rwkv', 'chat', '-m', made))}")
    click.echo(one_line(made))


def _only(repository: Repository) -> Choice:
    """Return the repository's checkpoint. Several are listed."""
    if len(repository.choices) == 1:
        return repository.choices[0]
    if not repository.choices:
        raise click.ClickException(f"{repository.name}: has no checkpoint; name a repository with one")
    rows = [(choice.name, f"{choice.size / 1e6:,.1f}") for choice in repository.choices]
    click.echo(columns([("checkpoint", "MB"), *rows], right=[1]))
    example = pasted("rwkv", "pull", f"{repository.name}/{repository.choices[0].name}")
    raise click.ClickException(f"{repository.name}: has {len(rows)} checkpoints; name one, such as: {example}")
