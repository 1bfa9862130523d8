"""``refine``: a compressed model in, the same codes with other scales, norms and biases out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from opt8bit.backends import warn
from opt8bit.ptq import ranks
from opt8bit.ptq.model.blocks import evaluating, find_blocks
from opt8bit.ptq.model.recording import no_cache
from opt8bit.ptq.model.rehearsal import rehearse
from opt8bit.ptq.model.source import InMemory, Loaded, Source
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.ptq.refinement.losses import LOSSES, Windows, apart, counts_of, next_tokens
from opt8bit.ptq.refinement.need import warn_of_memory
from opt8bit.ptq.refinement.passes import Chain, mixed_precision, products_of
from opt8bit.ptq.refinement.student import Student
from opt8bit.ptq.refinement.training import Schedule, train
from opt8bit.ptq.result import Refined, Result, Step
from opt8bit.ptq.tasks.causal_lm import CausalLM
from opt8bit.ptq.tasks.task import Batch, Calibration, Probe
from opt8bit.recipe.arguments import check_count, check_one_of, check_positive
from opt8bit.recipe.learning import EFFORTS

SET_ASIDE = 8  # one window of so many tells which parameters are best, and is not learned from
TEACHER = 64  # most likely tokens of the float model that are kept for each token
TASK = CausalLM()
BALANCED = EFFORTS["balanced"]


def refine(
    result: Result,
    text: Calibration,
    *,
    steps: int = BALANCED.steps,
    windows: int = BALANCED.windows,
    lr: float = 2e-3,
    vector_lr: float = 1e-3,
    loss: str = "kl",
    biases: bool = False,
    choose_by: Calibration | None = None,
    held_out: Calibration | None = None,
    looks: int = 5,
    seed: int = 0,
    see: Callable[[Step], None] | None = None,
) -> Result:
    """Trains the scales, norms and biases of a compressed model as a whole; its codes stay as they are.

    The loss is the Kullback-Leibler divergence from the float model's next-token distribution, of which the 64 most
    likely tokens and the mass of all others are kept, or the cross-entropy of the text's own next tokens. The optimizer
    is :class:`opt8bit.AdamW8bit` without weight decay, whose learning rates fall to 0 along a cosine. The parameters of
    the least loss on text that is not learned from are kept, those at the start included, so that there the model is
    never worse than it was.

    Scales are trained by their logarithms, in the dtype in which they are stored; zero points are integers and stay.
    Where the processor has arithmetic for bfloat16, products of matrices are computed in it.

    Args:
        result: of :func:`compress`; it stays as it is.
        text: as ``calibration`` of :func:`compress`; best the same.
        steps: of the optimizer; 0 returns the start.
        windows: sequences of a step.
        lr: of the logarithms of scales: a step changes a scale by about this fraction.
        vector_lr: of norms and biases.
        loss: "kl" for the float model's predictions, or "next-token" for the text's: with a text of your own, this is
            fine-tuning of a compressed model.
        biases: whether the model's own biases in its blocks' layers are trained, too. Those that the result has set
            always are.
        choose_by: text to tell by which parameters are kept; by default the last eighth of the sequences of ``text``,
            one at least. Layers fit the text that they were rounded on, so the choice is the better if it is another.
            :func:`compress` with ``learn`` sets an eighth of its text aside before it rounds.
        held_out: text to tell by how good the new result is, as of :func:`compress`.
        looks: how often the loss on the windows that are not learned from is measured.
        seed: of the order of the windows. The same seed gives the same bytes, on the same machine with as many threads.
        see: called before the first step and after each.

    Returns:
        A result with other ``changes``, ``probe``, ``quality`` and ``refined``. Its ``report`` is of before.

    Raises:
        TypeError, ValueError: an argument is none of these; the text has a single sequence; the model puts out no
            logits, or its blocks hand more to later ones than hidden states; there are several processes.

    Warns:
        UserWarning: no step has lowered the held-out loss, so that the start is what is returned; or a step was dropped
            as its loss or a gradient was not finite; or the machine's memory will not do.

    Source: EfficientQAT: Efficient Quantization-Aware Training for Large Language Models, section 3.3
    (https://arxiv.org/abs/2407.11062), by distillation here.
    """
    schedule = _checked(steps, windows, lr, vector_lr, looks, seed)
    check_one_of("loss", loss, LOSSES)
    batches = TASK.batches("text", text, windows, result.model)
    chosen = [] if choose_by is None else TASK.batches("choose_by", choose_by, windows, result.model)
    evaluated = [] if held_out is None else TASK.batches("held_out", held_out, windows, result.model)
    check_can_learn(result.source, [*batches, *chosen], windows)
    if not chosen:
        batches, chosen = set_aside(batches)
    few = TASK.smallest(batches[0])
    products = products_of(result.model, few)
    student = Student(result, TrainScales(lr), products, biases=biases)
    with evaluating(student.model, result.model):
        known = rehearse(result.source, *find_blocks(result.model), few)
        with mixed_precision(few["input_ids"].device, products):
            chain, teacher = (Chain(source, known, few) for source in (InMemory(student.model), result.source))
            examples = _windows([*batches, *chosen], teacher if loss == "kl" else None)
            kept = sum(len(batch["input_ids"]) for batch in chosen)
            learned, held_back = examples[:-kept], examples[-kept:]
            found = train(student, chain, learned, held_back, LOSSES[loss], schedule, see or (lambda step: None))
        _warn(found)
        refined = replace(result, refined=found)
        if found.kept:
            refined.changes = {**result.changes, **student.changes()}
            _renew(refined, teacher, few, evaluated)
    return refined


def check_can_learn(source: Source, batches: Sequence[Batch], windows: int) -> None:
    """Checks what is known before a refinement begins, and before the model is compressed for it.

    Args:
        source: of the float model.
        batches: to learn from.
        windows: of a step.

    Raises:
        ValueError: there are too few sequences, or several processes.

    Warns:
        UserWarning: the machine's memory will not do.
    """
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    if sequences < 2:
        raise ValueError(f"learning takes 2 sequences of text at least, one of them to choose by, got {sequences}")
    if ranks.size() > 1:
        raise ValueError(f"learning is for a single process, got {ranks.size()}")
    if batches[0]["input_ids"].device.type == "cpu":
        length = max(batch["input_ids"].shape[1] for batch in batches)
        warn_of_memory(source.model, windows, length, in_memory=isinstance(source, Loaded))


def set_aside(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Returns batches without the last eighth of their sequences, and that eighth, one sequence at least."""
    learned, chosen = list(batches), list[Batch]()
    wanted = max(1, sum(len(batch["input_ids"]) for batch in batches) // SET_ASIDE)
    while wanted:
        last = learned.pop()
        count = min(wanted, len(last["input_ids"]))
        kept = len(last["input_ids"]) - count
        if kept:
            learned.append({name: value[:kept] for name, value in last.items()})
        chosen.insert(0, {name: value[kept:] for name, value in last.items()})
        wanted -= count
    return learned, chosen


def _checked(steps: int, windows: int, lr: float, vector_lr: float, looks: int, seed: int) -> Schedule:
    """
    Raises:
        ValueError: an argument is not what it must be.
    """
    check_count("steps", steps, least=0)
    check_count("windows", windows)
    check_positive("lr", lr)
    check_positive("vector_lr", vector_lr)
    check_count("looks", looks)
    check_count("seed", seed, least=0)
    return Schedule(steps, windows, lr, vector_lr, looks, seed)


def _windows(batches: Sequence[Batch], teacher: Chain | None) -> list[Windows]:
    """Returns sequences, and what they are to predict: what a teacher does, or without one their own next tokens."""
    if teacher is None:
        found = [Windows(batch, (next_tokens(batch),), counts_of(batch)) for batch in batches]
    else:
        found = [
            Windows(batch, teacher.predictions(batch, hidden, TEACHER), counts_of(batch))
            for batch, hidden in zip(batches, teacher.behind(batches), strict=True)
        ]
    return [each for windows in found for each in apart(windows)]


def _warn(found: Refined) -> None:
    """Warns that nothing was kept of the training, or that steps were dropped."""
    if found.dropped:
        warn(f"{found.dropped} steps were dropped: their loss or a gradient was not finite")
    if found.steps and not found.kept:
        warn(f"no step has lowered the loss of {found.start:.4f} on held-out windows: the result is as it was")


def _renew(result: Result, teacher: Chain, few: Batch, held_out: Sequence[Batch]) -> None:
    """Measures anew what the result's model puts out, and how good it is."""
    model = result.compressed_model().eval()
    with evaluating(model):
        if result.probe is not None:
            inputs, tokens = result.probe.inputs, len(result.probe.logits)
            output: Any = model(**inputs, **no_cache(model))
            result.probe = Probe(inputs, output.logits[0, -tokens:].float())
        chain = Chain(InMemory(model), teacher.known, few)
        streams = [each.behind(held_out) for each in (teacher, chain)]
        result.quality = TASK.quality(teacher.end, held_out, *streams, end_hat=chain.end)
