"""RWKV models for lm-evaluation-harness, under the name rwkv. It has loglikelihood, rolling and generate_until.

    python -m rwkv_cli.lm_eval run --model rwkv --model_args path=model.safetensors --tasks lambada_openai

This registers the model and calls the harness's own command line. Releases of the harness that look for entry points of
`lm_eval.models` find the model without it: lm_eval run --model rwkv …

Each text begins after token 0, as in the reference's tests of models. For RWKV-4 of the Pile it is a line break. So do
the harness's contexts. A state has no longest context: nothing is cut off, and rolling likelihoods are those of whole
texts.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import MODEL_REGISTRY, register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from rwkv_cli.engine.batch import complete_together
from rwkv_cli.engine.completion import Completion, Request
from rwkv_cli.engine.library import find
from rwkv_cli.engine.likelihood import BATCH, Question, answer_questions, start_of_text
from rwkv_cli.engine.messages import read_chat
from rwkv_cli.engine.model import LanguageModel, obey
from rwkv_cli.engine.sampling import Sampler, Sampling
from rwkv_cli.errors import RwkvError

Pair = tuple[tuple[str, str], list[int], list[int]]
"""A context and what follows, as texts and as ids."""


class RwkvLM(TemplateLM):
    """A converted model for the harness."""

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        threads: int | None = None,
        batch_size: int | str = BATCH,
        seed: int = 0,
        **_other: Any,
    ) -> None:
        """Load a model by path or name. `batch_size` is how many texts go through it together. It changes no result.

        Where nothing is said, the harness gives 1, which is taken for 16. It asks for cuda:0 then, which takes the GPU
        if there is one and the model fits there.
        """
        super().__init__()
        self.model = LanguageModel.load(find(path), "auto" if device.startswith("cuda:") else device, threads)
        self._size = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else BATCH
        self._seed = seed
        self.model.prepare("last", "every", "losses")

    @property
    def eot_token_id(self) -> int:
        return self.model.ends[0]

    @property
    def prefix_token_id(self) -> int:
        return start_of_text(self.model)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path)

    def tok_encode(self, string: str, **_other: Any) -> list[int]:
        return self.model.text_tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a chat as the model's own template does, up to the answer."""
        if not add_generation_prompt:
            raise ValueError("a chat that ends within an answer has no form for this model; leave gen_prefix out")
        chat = read_chat(json.dumps(chat_history).encode(), "the chat of a task")
        form = self.model.template.template().for_chat(chat)
        return form.whole(chat, form.default_think)

    def _started(self, ids: Sequence[int]) -> list[int]:
        """Return a context behind the token that starts texts. The harness gives that alone for an empty context."""
        return list(ids) if list(ids[:1]) == [self.prefix_token_id] else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_other: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods and greediness. The longest contexts come first, each once for all that follows."""
        contexts = [tuple(self._started(context)) for _, context, _ in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(contexts[i]), contexts[i]))
        groups = [list(group) for _, group in groupby(order, lambda i: contexts[i])]
        questions = [Question(contexts[group[0]], [requests[i][2] for i in group]) for group in groups]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        found = (each for some in answer_questions(self.model, questions, size=self._size) for each in some)
        for group, likelihoods in zip(groups, _shown(found, len(groups), disable_tqdm), strict=True):
            for i, one in zip(group, likelihoods, strict=True):
                results[i] = -one.nll, one.greedy
                self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, each in one state from its first token to its last."""
        results = []
        for request in _shown(requests, len(requests), disable_tqdm):
            (text,) = request.args
            ids = [self.prefix_token_id, *self.tok_encode(text)]
            nll = 0.0
            if len(ids) > 1:
                nll = float(self.model.losses(ids[:-1], ids[1:], self.model.new_state(), watch=obey).sum())
            results.append(-nll)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return texts up to what ends them. Longer contexts come first, so that those read together are alike."""
        prompts = [self._started(self.tok_encode(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
        completions = {self._completion(prompts[i], requests[i].args[1]): i for i in order}
        results = [""] * len(requests)
        made = (one for ended, _ in complete_together(self.model, completions, self._size) for one in ended)
        for completion in _shown(made, len(requests), disable_tqdm):
            i = completions[completion]
            results[i] = completion.result.text
            self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
        return results

    def _completion(self, prompt: list[int], given: dict[str, Any]) -> Completion:
        """Return the completion of a request. Without a temperature, the likeliest token is taken."""
        wanted: dict[str, Any] = normalize_gen_kwargs(given)
        settings = Sampling(
            temperature=float(wanted.get("temperature", 0.0)),
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=int(wanted.get("top_k", 0)),
            presence_penalty=0,
            frequency_penalty=0,
        )
        stops = [stop for stop in wanted["until"] if stop]
        request = Request(prompt, wanted["max_gen_toks"], stops)
        return Completion(self.model, self.model.new_state(), Sampler(settings, self._seed), request)


def _shown(items: Iterable[Any], total: int, hidden: bool) -> Iterator[Any]:
    """Show how far requests are done, as the harness does."""
    return iter(tqdm(items, total=total, disable=hidden, desc="Running requests"))


def main() -> None:
    """Run the harness's command line, with this model in it."""
    if "rwkv" not in MODEL_REGISTRY:
        register_model("rwkv")(RwkvLM)
    try:
        cli_evaluate()
    except RwkvError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
