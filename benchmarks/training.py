"""The trainer against transformers' Trainer: the same model, rows, optimizer and learning rates.

python -m benchmarks.training [--directory DIR] [--steps N] [--rounds N] [--batch-size N]
                              [--autocast] [--curves]

Each side trains from the same float32 weights in a process of its own, round by round in turn, on
the demo's conversations, in the same order. The rate counts tokens that are not padding, behind the
first steps; where others use the machine, the rate per second of CPU time says more. --curves
prints the loss of every step of both.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import run_apart
from benchmarks.shared import empty_scratch, parser_of
from benchmarks.table import Goal, Row, render, row

BATCH_SIZE = 16
MAX_TOKENS = 512
MICRO_BATCH_TOKENS = 2048  # of ours at most; parted by length, so that little of them is padding
WARM_UP = 2  # steps that no rate counts
VOCABULARY = 6400  # MiniMind's; the demo's tokenizer needs less
THREE_TENTHS_FASTER = Goal(figure="ratio", value=1.3)
# Of MiniMind's sizes, under the name by which transformers has the same computation.
DENSE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
SPARSE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 352,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both sides do: steps from the weights in `checkpoint`, in BF16 by autocast or not."""

    checkpoint: Path
    steps: int
    autocast: bool = False
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The loss of every step, and the tokens per second of those behind the first ones: of the
    clock and of CPU time, all threads together.
    """

    losses: Sequence[float]
    rate: float
    cpu_rate: float


@dataclass
class Watch:
    """Notes when each step ends."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.clock.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def trained(self, losses: Sequence[float], tokens: Sequence[int]) -> Trained:
        """Return what was found of steps of so many tokens."""
        count = sum(tokens[WARM_UP:])
        first = WARM_UP - 1
        return Trained(
            losses=losses,
            rate=count / (self.clock[-1] - self.clock[first]),
            cpu_rate=count / (self.cpu[-1] - self.cpu[first]),
        )


def write_model(directory: Path, fields: Mapping[str, Any], vocabulary: int = VOCABULARY) -> Path:
    """Write a checkpoint with fresh float32 weights and the demo's tokenizer."""
    from neuron_minimax.config import ModelConfig
    from neuron_minimax.demo import DEMO
    from neuron_minimax.model.decoder import initial_state
    from neuron_minimax.training.weights import Precision, copy_tokenizer, export_checkpoint

    config = ModelConfig.from_dict({**fields, "vocab_size": vocabulary, "eos_token_id": None})
    export_checkpoint(initial_state(config, 0), config, directory, Precision.FLOAT32)
    copy_tokenizer(DEMO, directory)
    return directory


def options_of(run: Run) -> Any:
    from neuron_minimax.training.options import TrainingOptions

    return TrainingOptions(
        steps=run.steps,
        batch_size=run.batch_size,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        max_tokens=MAX_TOKENS,
        learning_rate=5e-4,
        warmup_steps=2,
        aux_loss_alpha=0.0,  # transformers adds its own to a run only when it is asked to
        autocast=run.autocast,
    )


def sequences(checkpoint: Path) -> Any:
    from neuron_minimax.training.data.encoding import Encoder
    from neuron_minimax.training.data.sequences import MadeSequences
    from neuron_minimax.training.data.sources import DemoSource
    from neuron_minimax.training.data.tokenizer import load_tokenizer

    return MadeSequences(DemoSource(0), Encoder(load_tokenizer(checkpoint), MAX_TOKENS))


def ours(run: Run, directory: Path) -> Trained:
    """Train with this project's trainer."""
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.training.trainer import Trainer
    from neuron_minimax.training.weights import read_initial

    checkpoint = Checkpoint.open(run.checkpoint)
    source = sequences(run.checkpoint)
    trainer = Trainer(
        config=checkpoint.config,
        options=options_of(run),
        source=source,
        encoder=source.encoder,
        directory=directory / "ours",
        initial=read_initial(checkpoint, checkpoint.config),
        save_every=run.steps + 1,
    )
    watch = Watch()
    tokens = []
    losses = []
    for report in trainer.run():
        watch.step()
        tokens.append(report.tokens)
        losses.append(report.loss)
        if report.step == run.steps - 1:  # the last one saves a state; theirs saves none
            break
    return watch.trained(losses, tokens)


def transformers(run: Run, directory: Path) -> Trained:
    """Train with transformers' Trainer, rows padded to the longest of their step."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from neuron_minimax.training.options import Schedule

    options = options_of(run)
    source = sequences(run.checkpoint)
    rows = [source.example(index) for index in range((run.steps - 1) * run.batch_size)]
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=options.betas,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(options).share)
    watch = Watch()
    losses: list[float] = []

    class Watching(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            watch.step()

        def on_log(self, *arguments: Any, **more: Any) -> None:
            losses.extend([more["logs"]["loss"]] if "loss" in more["logs"] else [])

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory / "transformers"),
            per_device_train_batch_size=run.batch_size,
            max_steps=run.steps - 1,
            max_grad_norm=options.clip_norm,
            bf16=run.autocast,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=[{"example": example} for example in rows],
        data_collator=_collate,
        optimizers=(optimizer, scheduler),
        callbacks=[Watching()],
    )
    trainer.train()
    tokens = [
        sum(len(example.ids) for example in rows[first : first + run.batch_size])
        for first in range(0, len(rows), run.batch_size)
    ]
    return watch.trained(losses, tokens)


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad the rows of a step on the right; transformers shifts the labels itself."""
    import torch

    from neuron_minimax.training.data.encoding import pad

    batch = pad([each["example"] for each in rows])
    return {
        "input_ids": batch.ids_BT,
        "attention_mask": batch.real_BT.long(),
        "labels": torch.where(batch.learned_BT, batch.ids_BT, -100),
    }


def compare(run: Run, directory: Path, rounds: int) -> tuple[list[Trained], list[Trained]]:
    """Train `rounds` times with each, in turn."""
    mine = []
    theirs = []
    for _ in range(rounds):
        mine.append(run_apart(ours, run, empty_scratch(directory)))
        theirs.append(run_apart(transformers, run, empty_scratch(directory)))
    return mine, theirs


def models(directory: Path) -> dict[str, Path]:
    """Return the checkpoints that are trained, by what a row calls them."""
    from neuron_minimax.training.sizes import SIZES

    small = {n: v for n, v in SIZES["minimind"]["26M"].items() if n not in ("use_moe", "dropout")}
    found = {}
    for name, fields in (("26M dense", DENSE), ("MoE, 2 of 8 experts", SPARSE)):
        path = directory / "trained" / name.replace(",", "").replace(" ", "-")
        if not (path / "config.json").exists():
            write_model(path, {**small, **fields})
        found[name] = path
    return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is trained. `autocast` measures BF16 too, which few processors multiply."""

    rounds: int = 2
    steps: int = 8
    batch_size: int = BATCH_SIZE
    autocast: bool = False
    curves: bool = False


def rows(directory: Path, **plan: Any) -> list[Row]:
    """Return two rows for each model: by the clock, and by CPU time."""
    wanted = Plan(**plan)
    found = []
    for name, checkpoint in models(directory).items():
        for autocast in (False, True) if wanted.autocast else (False,):
            run = Run(
                checkpoint=checkpoint,
                steps=wanted.steps,
                batch_size=wanted.batch_size,
                autocast=autocast,
            )
            mine, theirs = compare(run, directory, wanted.rounds)
            precision = "BF16 by autocast" if autocast else "float32"
            what = f"training, {name}, {precision}, {wanted.batch_size} rows"
            if wanted.curves:
                print(f"{what}: loss of ours and of transformers' Trainer")
                for step, pair in enumerate(zip(mine[0].losses, theirs[0].losses, strict=True), 1):
                    print(f"{step:4}  {pair[0]:.4f}  {pair[1]:.4f}")
            pairs = {
                "tokens/s": [[each.rate for each in side] for side in (mine, theirs)],
                "tokens/CPU s": [[each.cpu_rate for each in side] for side in (mine, theirs)],
            }
            for unit, (rates, peers) in pairs.items():
                peer = ("transformers' Trainer", peers)
                found.append(row(what, rates, unit, peer=peer, goal=THREE_TENTHS_FASTER))
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--autocast", action="store_true", help="in BF16 too")
    parser.add_argument("--curves", action="store_true", help="print the loss of every step")
    arguments = vars(parser.parse_args())
    print(render(rows(arguments.pop("directory"), **arguments)))


if __name__ == "__main__":
    main()
