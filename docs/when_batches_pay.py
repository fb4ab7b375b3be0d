"""What batches and drafts bring on a GPU that nobody has here, by bytes and arithmetic: the table of a page.

    python docs/when_batches_pay.py

A pass over B rows of T tokens is products with weights and then attention. Products take as long as the
slower of two things: reading the weights once, and two operations for each weight and token. Attention takes
as long as reading the keys and values of B contexts. Nothing else is counted, so these are bounds. Draft
lengths are the best ones by that.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH_SIZES = (1, 4, 16, 32, 64, 128)  # of 128 contexts of 1,000 tokens, an H100 of 80 GB is full
ALPHAS = (0.7, 0.8, 0.9)
LONGEST = 20


@dataclass(frozen=True)
class Machine:
    """An H100 and a Llama-2-7B in bf16, drafts by 8 of its 32 layers."""

    weight_bytes: float = 13.5e9
    bytes_per_second: float = 3.35e12
    operations_per_second: float = 990e12  # bf16, dense
    cache_bytes_per_token: float = 0.5e6
    context: int = 1000
    share_of_draft: float = 8 / 32  # of layers, and so of weights and cache; the head is small

    def seconds(self, batch_size: int, width: int, share: float = 1.0) -> float:
        """Of a pass over `batch_size` rows of `width` tokens by this share of the layers."""
        weights = self.weight_bytes / 2  # two bytes each
        computing = 2 * weights * batch_size * width / self.operations_per_second
        products = max(self.weight_bytes / self.bytes_per_second, computing)
        cache = batch_size * self.context * self.cache_bytes_per_token
        return share * (products + cache / self.bytes_per_second)

    def round(self, batch_size: int, k: int) -> float:
        """Seconds of k drafted tokens for each row, and a verification by the layers that did not draft; the
        last drafted token goes through the first ones too.
        """
        drafts = (k + (k > 0)) * self.seconds(batch_size, 1, self.share_of_draft)
        return drafts + self.seconds(batch_size, k + 1, 1 - self.share_of_draft if k else 1.0)


def tokens_per_round(alpha: float, k: int) -> float:
    """Expected, where a drafted token is accepted with the chance alpha if all before it were."""
    return (1 - alpha ** (k + 1)) / (1 - alpha)


def best(machine: Machine, batch_size: int, alpha: float) -> tuple[int, float]:
    """The draft length that brings most, 0 for none, and the speed-up over decoding without drafts."""
    plain = machine.round(batch_size, 0)

    def speedup(k: int) -> float:
        return tokens_per_round(alpha, k) * plain / machine.round(batch_size, k)

    k = max(range(LONGEST + 1), key=speedup)
    return k, speedup(k)


def table(machine: Machine) -> str:
    """In Markdown: a row for each batch size."""

    def row(*cells: object) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    heads = [f"k, speed-up at {alpha}" for alpha in ALPHAS]
    lines = [row("B", "tokens/s, no drafts", *heads), row(*["---"] * (2 + len(ALPHAS)))]
    for size in BATCH_SIZES:
        found = (best(machine, size, alpha) for alpha in ALPHAS)
        cells = [f"{k}, {gain:.2f} x" for k, gain in found]
        lines.append(row(size, f"{size / machine.round(size, 0):,.0f}", *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    for context in (1000, 100):
        print(f"contexts of {context} tokens\n\n{table(Machine(context=context))}\n")
