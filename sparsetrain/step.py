"""One step of training, in the order of docs/method.md, and the state it moves on."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from sparsetrain import checkpoint, parallel, sparsity
from sparsetrain.candidates import finish_refill_, start_refill
from sparsetrain.config import RunConfig
from sparsetrain.data import Corpus, evaluation_batches
from sparsetrain.locality.wiring import Wiring
from sparsetrain.loop import TrainingError
from sparsetrain.model import Transformer
from sparsetrain.optim import build_adam, decay_, learning_rate, scale_gradients_

log = logging.getLogger(__name__)

LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Training:
    """The state of a run between two steps: all of it is in a checkpoint."""

    config: RunConfig
    corpus: Corpus
    model: Transformer
    optimizer: torch.optim.Adam
    device: torch.device
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in steps, from the first one on
    val_loss: float | None = None  # at the last evaluation
    tensors: list[sparsity.Projected] = field(default_factory=list)
    wiring: Wiring | None = None  # places of nodes, where long wires are dear


def build(config: RunConfig, corpus: Corpus, device: torch.device) -> Training:
    """A run before its first step, its weights drawn from its seed."""
    generator = torch.Generator().manual_seed(config.run.seed)
    model = Transformer(config.model, corpus.tokenizer.get_vocab_size(), generator)
    model.checkpoint_activations = config.train.checkpoint_activations
    model = _sharded(model, device) if config.run.sharded and parallel.n_ranks() > 1 else model.to(device)
    model.train()
    run = Training(config, corpus, model, build_adam(model, config.optim), device)
    run.tensors = sparsity.projected(model, config.sparsity)
    if config.locality.pressure != "none":
        run.wiring = Wiring(config.locality, model, run.tensors, config.run.seed)
        run.wiring.refuse_if_dense(config.sparsity)
    return run


def _sharded(model: Transformer, device: torch.device) -> Transformer:
    log.info("each holds a share of every weight; products are dense")
    parallel.shard_(model, model.blocks, device)
    return model


def train_step(run: Training, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One optimiser step, in the order of docs/method.md.

    Args:
        run: the state, which moves on.
        loss_of: `run.model.loss`, compiled or not.
        inputs, targets: (B, T), on the device of the run; with several processes the rows that are this one's.

    Returns:
        The loss and the gradients' RMS, 0-d; of the whole batch.
    """
    c = run.config
    progress = run.step / c.train.steps
    lr = learning_rate(c.optim, c.sparsity, progress)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    n_sequences = c.train.batch_size // c.train.accumulate  # of a part: candidates are chosen in the first
    refill = start_refill(run.tensors, c.sparsity, run.step, c.train.steps, n_sequences)
    loss = add_gradients_(c, loss_of, inputs, targets)
    parallel.average_(chain([loss], _own_gradients(run)))
    if run.wiring:
        run.wiring.add_gradients_(progress)
    rms = scale_gradients_(run.model, c.optim.gradient)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.wiring:
        run.wiring.shrink_(lr, progress)
        sparsity.project_all_(run.tensors, c.sparsity, progress, partial(run.wiring.factor, progress=progress))
    else:
        sparsity.project_all_(run.tensors, c.sparsity, progress)
    decay_(run.model, c.optim, lr)
    run.step += 1
    if run.wiring:
        run.wiring.move_(run.step)
    try:
        finish_refill_(refill, run.optimizer, c.sparsity, progress)
        read_weights_(run)
    except ValueError:
        raise not_finite(run, "a weight became infinite or NaN", run.step) from None
    return loss, rms


def add_gradients_(config: RunConfig, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> Tensor:
    """Run a batch (B, T) forward and backward, in as many parts as `train.accumulate` says; the mean loss, 0-d."""
    n_parts = config.train.accumulate
    loss = torch.zeros((), device=inputs.device)
    for part_in, part_out in zip(inputs.chunk(n_parts), targets.chunk(n_parts), strict=True):
        part = loss_under(config, loss_of, part_in, part_out) / n_parts
        part.backward()
        loss += part.detach()
    return loss


def _own_gradients(run: Training) -> Iterator[Tensor]:
    """Gradients of this process' rows of a batch; those of sharded weights were averaged as they came."""
    return (p.grad for p in run.model.parameters() if p.grad is not None and not parallel.is_sharded(p))


def read_weights_(run: Training) -> None:
    """Choose each linear map's product for the weights as they are now: after a step, and before the first."""
    if parallel.is_sharded(run.tensors[0].parameter):
        return
    c = run.config
    n_tokens = c.train.batch_size // (c.train.accumulate * parallel.n_ranks()) * c.model.n_ctx
    progress = max(0, run.step - 1) / c.train.steps
    sparsity.read_all_(run.tensors, c.sparsity, progress, n_tokens, getattr(torch, c.run.dtype))


@torch.no_grad()
def evaluate(run: Training) -> float:
    """Mean held-out loss in nats per token, on the same windows each time."""
    c = run.config
    run.model.eval()
    sums = [
        (_loss_of_mine(run, x, y), parallel.n_mine(len(x)))
        for x, y in evaluation_batches(
            run.corpus.tokens("val"), c.train.eval_batches, c.train.batch_size, c.model.n_ctx, c.train.stride
        )
    ]
    run.model.train()
    total, n_sequences = parallel.sums(sum(loss * n for loss, n in sums), sum(n for _, n in sums))
    return total / n_sequences


def _loss_of_mine(run: Training, inputs: Tensor, targets: Tensor) -> float:
    """The mean loss over this process' rows; over the first where it has none, since all must take part in a pass."""
    x, y = (parallel.mine(rows) if parallel.n_mine(len(rows)) else rows[:1] for rows in (inputs, targets))
    return loss_under(run.config, run.model.loss, x.to(run.device), y.to(run.device)).item()


def loss_under(config: RunConfig, loss_of: LossOf, inputs: Tensor, targets: Tensor) -> Tensor:
    """The loss, under the autocast that a run asks for."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.run.dtype == "bfloat16"):
        return loss_of(inputs, targets)


def not_finite(run: Training, what: str, step: int) -> TrainingError:
    """The error that says what went wrong at a step, and what is left."""
    kept = checkpoint.latest_checkpoint(run.config.run_dir)
    return TrainingError(
        f"{what} at step {step}; the last good state is {kept or 'the beginning'}; try a lower optim.lr"
    )
