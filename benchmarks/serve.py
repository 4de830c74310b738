"""The server under load, as its clients see it. It starts `rwkv serve` on a free port for each measurement.

    python benchmarks/serve.py load MODEL [--clients 64] [--minutes 10]
    python benchmarks/serve.py throughput MODEL [--clients 16] [--tokens 64] [--temperature 1]
    python benchmarks/serve.py turns MODEL [--tokens 10000]
    python benchmarks/serve.py schema MODEL [--requests 500]

load: clients that ask one thing after the other, each time another prompt; a few leave in the middle. It counts what is
lost, and prints the time between tokens and the server's memory. throughput: tokens a second of many clients against
one, in turns. The flat distributions of random weights take ten times as long to sample as a trained model's, which
--temperature 0 leaves out. turns: seconds until the first token of a second turn behind so many tokens, with and
without the states that the server keeps. schema: answers under a JSON schema, each checked, and their time a token
against free text's.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = ["dog", "cat", "bird", "fish", "tree", "house", "river", "friend", "sun", "rain", "ball", "cake", "boat"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["dog", "cat", "bird"]},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "likes"],
    "additionalProperties": False,
}


@dataclass
class Server:
    """A server's process."""

    process: subprocess.Popen[str]
    port: int

    def memory(self) -> float:
        """Megabytes of its own memory, without the file that is mapped."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else float("nan")


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
    """Serve a model on a free port."""
    line = [sys.executable, "-P", "-m", "rwkv_cli", "serve", "-m", model, "--port", "0", "--cache-disk", "0", *options]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        said = next((line for line in process.stderr or () if line.startswith("Serving ")), "")
        yield Server(process, int(said.partition("/v1")[0].rpartition(":")[2]))
        process.terminate()


@dataclass
class Stream:
    """A stream as its client saw it."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    reason: str | None = None
    tokens: int = 0


async def ask(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        if b" 200 " not in await reader.readline():
            raise RuntimeError((await reader.read()).decode())
        async for line in reader:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()


async def stream(port: int, body: dict[str, Any], leave: int | None = None) -> Stream:
    """Read a completion, or the first `leave` pieces of it."""
    got = Stream()
    events = ask(port, "/v1/completions", body)
    async for event in events:
        for choice in event["choices"]:
            if choice["text"]:
                got.text += choice["text"]
                got.times.append(time.perf_counter())
            got.reason = choice["finish_reason"] or got.reason
        if event.get("usage"):
            got.tokens = event["usage"]["completion_tokens"]
        if leave is not None and len(got.times) >= leave:
            break
    await events.aclose()  # type: ignore[attr-defined]
    return got


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def load(model: str, clients: int, minutes: float) -> None:
    gaps: list[float] = []
    counts = {"answers": 0, "left": 0, "lost": 0, "tokens": 0}

    async def client(port: int, number: int, until: float) -> None:
        chance = random.Random(number)
        while time.perf_counter() < until:
            prompt = "Once upon a time there was a " + " ".join(chance.choices(WORDS, k=chance.choice((3, 30, 300))))
            leave = 5 if chance.random() < 0.1 else None
            body = {"prompt": prompt, "max_tokens": chance.randint(20, 120), "seed": chance.randrange(1 << 30)}
            try:
                got = await stream(port, body, leave)
            except (RuntimeError, OSError) as error:
                print(error, file=sys.stderr)
                counts["lost"] += 1
                continue
            counts["answers" if got.reason else "left"] += 1
            counts["lost"] += got.reason is None and leave is None
            counts["tokens"] += got.tokens
            gaps.extend(b - a for a, b in zip(got.times, got.times[1:], strict=False))

    async def everyone(at: Server) -> None:
        until = time.perf_counter() + 60 * minutes
        tasks = [asyncio.create_task(client(at.port, number, until)) for number in range(clients)]
        memory = []
        while not all(task.done() for task in tasks):
            await asyncio.sleep(min(5, 10 * minutes))
            memory.append(at.memory())
        await asyncio.gather(*tasks)
        tenth = max(1, len(memory) // 10)
        first, last = statistics.mean(memory[tenth : 2 * tenth] or memory), statistics.mean(memory[-tenth:])
        print(f"memory: {first:.0f} MB after a tenth, {last:.0f} MB at the end")

    with server(
        model, "--cache", "64", "--max-requests", str(2 * clients)
    ) as at:  # who left is still there for a token
        start = time.perf_counter()
        asyncio.run(everyone(at))
        seconds = time.perf_counter() - start
    print(", ".join(f"{value} {name}" for name, value in counts.items()))
    print(f"{counts['tokens'] / seconds:.0f} tok/s; between two pieces of a text: "
          f"median {1000 * statistics.median(gaps):.0f} ms, 99 % {1000 * percentile(gaps, 0.99):.0f} ms")  # fmt: skip


def throughput(model: str, clients: int, tokens: int, temperature: float) -> None:
    async def together(port: int, count: int) -> float:
        common = {"max_tokens": tokens, "seed": 1, "logit_bias": {"0": -100}, "temperature": temperature}
        bodies = [{"prompt": f"{word} " * 8, **common} for word in (WORDS * count)[:count]]
        start = time.perf_counter()
        got = await asyncio.gather(*(stream(port, body) for body in bodies))
        return sum(one.tokens for one in got) / (time.perf_counter() - start)

    with server(model, "--cache", "0") as at:
        asyncio.run(together(at.port, clients))
        one, many = [], []
        for _ in range(5):
            one.append(asyncio.run(together(at.port, 1)))
            many.append(asyncio.run(together(at.port, clients)))
    ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
    print(
        f"1 client: {statistics.median(one):.1f} tok/s, {clients}: {statistics.median(many):.1f} tok/s, {ratio:.2f} ×"
    )


def turns(model: str, tokens: int) -> None:
    async def first_token(port: int, messages: list[dict[str, str]]) -> tuple[float, str, int]:
        start, text, known, first = time.perf_counter(), "", 0, 0.0
        # a trained model spells its answers as its tokenizer does, and so does the grammar where weights are random
        said = 'start: "The little dog ran home to the old house by the river, and there it found a ball."'
        body = {"messages": messages, "max_tokens": 32, "seed": 1, "think": False, "grammar": said}
        async for event in ask(port, "/v1/chat/completions", body):
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    text += choice["delta"]["content"]
            if event.get("usage"):
                known = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        return first, text, known

    for options, says in (((), "with"), (("--cache", "0"), "without")):
        with server(model, *options) as at:
            chance = random.Random(0)
            told = " ".join(chance.choices(WORDS, k=tokens))
            messages = [{"role": "user", "content": told}]
            once, text, _ = asyncio.run(first_token(at.port, messages))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
            seconds, _, known = asyncio.run(first_token(at.port, messages))
            print(f"{says} states: first turn {once:.2f} s, second {1000 * seconds:.0f} ms ({known} tokens known)")


def valid(text: str) -> bool:
    """True if a text is what the schema says."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    likes = value.get("likes")
    return (
        list(value) == ["name", "age", "kind", "likes"]
        and isinstance(value["name"], str) and len(value["name"]) <= 12
        and type(value["age"]) is int and 0 <= value["age"] <= 120
        and value["kind"] in ("dog", "cat", "bird")
        and 1 <= len(likes) <= 3 and all(isinstance(like, str) and len(like) <= 10 for like in likes)
    )  # fmt: skip


def schema(model: str, requests: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    formed, free = [], []

    async def answers(port: int, seeds: range) -> list[Stream]:
        room = asyncio.Semaphore(16)

        async def one(seed: int) -> Stream:
            async with room:
                body = {"prompt": "A pet as JSON: ", "seed": seed, "max_tokens": 400, "response_format": form}
                return await stream(port, body)

        return await asyncio.gather(*map(one, seeds))

    with server(model) as at:
        got = asyncio.run(answers(at.port, range(requests)))
        for seed in range(min(requests, 40)):
            start = time.perf_counter()
            (again,) = asyncio.run(answers(at.port, range(seed, seed + 1)))
            formed.append((time.perf_counter() - start) / again.tokens)
            assert again.text == got[seed].text, "an answer depends on what runs beside it"
            body = {"prompt": "A pet as JSON: ", "seed": seed, "max_tokens": again.tokens, "logit_bias": {"0": -100}}
            start = time.perf_counter()
            tokens = asyncio.run(stream(at.port, body)).tokens
            free.append((time.perf_counter() - start) / tokens)
    print(f"{sum(valid(one.text) for one in got)} of {requests} answers valid")
    ratio = statistics.median(a / b for a, b in zip(formed, free, strict=True))
    print(f"time a token: {1000 * statistics.median(formed):.2f} ms under the schema, "
          f"{1000 * statistics.median(free):.2f} ms free, {ratio:.3f} ×")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "throughput", "turns", "schema"])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--temperature", type=float, default=1)
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    if args.what == "load":
        load(args.model, args.clients or 64, args.minutes)
    elif args.what == "throughput":
        throughput(args.model, args.clients or 16, args.tokens or 64, args.temperature)
    elif args.what == "turns":
        turns(args.model, args.tokens or 10_000)
    else:
        schema(args.model, args.requests)


if __name__ == "__main__":
    main()
