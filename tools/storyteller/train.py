"""Train the bundled storyteller: RWKV-7 on TinyStories in the World chat template.

    pip install torch==2.13.0 numba tokenizers
    python tools/storyteller/train.py TINYSTORIES_V1.txt TINYSTORIES_V2.txt --out OUT [--steps N]

Writes OUT/tokenizer.json, OUT/log.jsonl, OUT/last.pt (a checkpoint to go on from, twice a minute) and, at the end,
OUT/model.pth in bfloat16 under the official names. The learning rate follows the steps, so that a run that was
stopped goes on where it was when the command is given again.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data import HELD_OUT, Requests, documents, read_stories, sequences, train_tokenizer
from model import RWKV7
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

LAYERS, WIDTH, VOCAB = 6, 256, 1920
RANKS = {"w": 16, "a": 16, "v": 16, "g": 32}
BATCH, LENGTH = 8, 512
WARM_UP = 100


def orthogonal(update: Tensor) -> Tensor:
    """The nearest orthogonal matrices of [matrices, rows, columns], by Newton–Schulz (Jordan et al., Muon, 2024)."""
    x = update.to(torch.bfloat16)
    wide = x.shape[1] > x.shape[2]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if wide else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the square and feed-forward matrices; decoupled weight decay."""

    def __init__(self, params: Sequence[Tensor], momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                updates = orthogonal(
                    torch.stack([torch.lerp(p.grad, self.state[p]["average"], group["momentum"]) for p in params])
                )
                scale = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def bits_per_byte(
    model: RWKV7, tokenizer: Tokenizer, stories: Sequence[str], prompts: Sequence[str] | None = None
) -> float:
    """Bits per byte of stories and their end, alone or each after its prompt."""
    model.eval()
    nll = 0.0
    with torch.no_grad():
        for story, prompt in zip(stories, prompts or [""] * len(stories), strict=True):
            before = [0, *tokenizer.encode(prompt).ids]
            after = tokenizer.encode(" " + story + "\n\n" if prompt else story + "<|endoftext|>").ids
            ids = torch.tensor(before + after)
            logits = model(ids[None, :-1])[0, len(before) - 1 :].float()
            nll += float(functional.cross_entropy(logits, ids[len(before) :], reduction="sum"))
    model.train()
    return nll / math.log(2) / sum(len(story.encode()) + 1 for story in stories)


def export(model: RWKV7, path: Path) -> None:
    """The official names, in bfloat16."""
    torch.save({name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs=2, type=Path, help="TinyStories V1 and V2; the last 200 of V2 are held out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)

    older, newer = map(read_stories, options.texts)
    stories, held_out = older[:-1] + newer[:-HELD_OUT], newer[-HELD_OUT:]
    requests = Requests(stories, rng)
    tokenizer = train_tokenizer(list(documents(stories, requests, rng)), VOCAB)
    tokenizer.save(str(options.out / "tokenizer.json"))
    asked = Requests(stories, random.Random(1))
    prompts = [f"User: {asked.for_story(story)}\n\nAssistant:" for story in held_out]

    model = RWKV7(LAYERS, WIDTH, VOCAB, RANKS, options.dropout)
    matrices = [
        p for n, p in model.named_parameters() if n.startswith("blocks") and n.endswith("weight") and p.ndim == 2
    ]
    chosen = {id(p) for p in matrices}
    large = [model.head.weight, model.emb.weight]
    small = [p for p in model.parameters() if id(p) not in chosen and not any(p is q for q in large)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW([{"params": large}, {"params": small}], betas=(0.9, 0.99), eps=1e-18)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stories)} stories", flush=True)

    step, seconds, last = 0, 0.0, options.out / "last.pt"
    if last.exists():
        kept = torch.load(last)
        model.load_state_dict(kept["model"])
        muon.load_state_dict(kept["muon"])
        adam.load_state_dict(kept["adam"])
        step, seconds = kept["step"], kept["seconds"]
        rng.seed(options.seed + step)
    rates = [
        (muon.param_groups[0], options.muon_lr, options.weight_decay),
        (adam.param_groups[0], options.adam_lr, options.weight_decay),
        (adam.param_groups[1], options.adam_lr, 0.0),
    ]
    rows = np.empty((0, LENGTH + 1), np.int64)
    total, counted = 0.0, 0
    started = saved = time.time()
    with (options.out / "log.jsonl").open("a") as log:
        while step < options.steps:
            if len(rows) < BATCH:
                fresh = sequences(list(documents(stories, requests, rng)), tokenizer, LENGTH, rng)
                rows = np.concatenate([rows, fresh[np.array(rng.sample(range(len(fresh)), len(fresh)))]])
            batch, rows = torch.from_numpy(rows[:BATCH]), rows[BATCH:]
            part = min((step + 1) / WARM_UP, 1.0, max((options.steps - step) / (0.7 * options.steps), 0.01))
            for group, rate, decay in rates:
                group["lr"], group["weight_decay"] = rate * part, decay
            logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.float().view(-1, VOCAB), batch[:, 1:].reshape(-1))
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step()
            adam.step()
            step, total, counted = step + 1, total + float(loss.detach()), counted + 1
            now = time.time()
            done = step == options.steps
            if step % 50 == 0 or done:
                line = {"step": step, "tokens": step * BATCH * LENGTH, "loss": round(total / counted, 4)}
                line["seconds"] = round(seconds + now - started)
                line["tokens_per_second"] = round(step * BATCH * LENGTH / (seconds + now - started))
                if step % 250 == 0 or done:
                    few = slice(None) if done else slice(0, None, 5)
                    line["held_out_bpb"] = round(bits_per_byte(model, tokenizer, held_out[few]), 4)
                    line["answers_bpb"] = round(bits_per_byte(model, tokenizer, held_out[few], prompts[few]), 4)
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
                total, counted = 0.0, 0
            if now - saved > 60 or done:
                state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
                torch.save(state | {"step": step, "seconds": seconds + now - started}, last.with_suffix(".part"))
                last.with_suffix(".part").replace(last)
                saved = now
    export(model, options.out / "model.pth")


if __name__ == "__main__":
    main()
