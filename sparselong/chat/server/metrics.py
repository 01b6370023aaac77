"""Counters of the endpoint in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from sparselong.chat.answer import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HELP = {
    "prompt_tokens_total": "Tokens of prompts.",
    "reused_tokens_total": "Tokens of prompts that were still in the cache.",
    "generated_tokens_total": "Generated tokens.",
    "answers_total": "Answers, finished or cancelled.",
    "first_token_seconds_total": "Seconds from the model's turn to the first token, summed.",
    "generation_seconds_total": "Seconds from the model's turn to the last token, summed.",
}


@dataclass
class Metrics:
    """What the endpoint has done since it was started."""

    requests: Counter[str] = field(default_factory=Counter)
    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def count_request(self, status: int) -> None:
        """Count a request by its status code."""
        self.requests[str(status)] += 1

    def count_answer(self, usage: Usage) -> None:
        """Add an answer's tokens and seconds."""
        added = {
            "prompt_tokens_total": usage.prompt_tokens,
            "reused_tokens_total": usage.reused_tokens,
            "generated_tokens_total": usage.new_tokens,
            "answers_total": 1,
            "first_token_seconds_total": usage.first_seconds,
            "generation_seconds_total": usage.seconds,
        }
        for name, value in added.items():
            self.totals[name] += value

    def write(self, running: int, waiting: int) -> str:
        """Return all figures as text.

        Args:
            running: answers that are generated now.
            waiting: requests that wait for the model.
        """
        lines = ["# HELP sparselong_requests_total Requests by status code."]
        lines.append("# TYPE sparselong_requests_total counter")
        for status, count in sorted(self.requests.items()):
            lines.append(f'sparselong_requests_total{{code="{status}"}} {count}')
        for name, text in _HELP.items():
            lines += [f"# HELP sparselong_{name} {text}", f"# TYPE sparselong_{name} counter"]
            lines.append(f"sparselong_{name} {self.totals[name]}")
        for name, value in (("running", running), ("waiting", waiting)):
            lines.append(f"# HELP sparselong_{name} Requests that are {name}.")
            lines += [f"# TYPE sparselong_{name} gauge", f"sparselong_{name} {value}"]
        return "\n".join(lines) + "\n"
