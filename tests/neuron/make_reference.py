"""Write tests/data/neuron_reference.safetensors: transformers' answers to the prompts of
`cases.py`.

Run from the repository root, with transformers 5.23 or later: `python -m
tests.neuron.make_reference`. Per model: `<name>.tokens` int64 [prompts, steps + 1] greedy, and
`<name>.logits` float32 [prompts, steps + 1, V], row 0 those of the last prompt position; the same
with `.bf16_attention` for attention weights rounded to BF16.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.neuron.cases import MODELS, REFERENCE, SEED, STEPS, prompts
from tests.tiny import write_tiny


def answer(model: torch.nn.Module, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the logits that chose them, each step from the whole text: no cache to be
    wrong.
    """
    ids = list(prompt)
    rows = []
    chosen = []
    for _ in range(STEPS + 1):
        rows.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float())
        chosen.append(int(rows[-1].argmax()))
        ids.append(chosen[-1])
    return torch.tensor(chosen), torch.stack(rows)


def main() -> None:
    found = {}
    for name, overrides in MODELS.items():
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            dense = write_tiny(Path(directory), seed=SEED, dense=True, use_mtp=False, **overrides)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                dense, dtype=torch.float32
            ).eval()
            for suffix in ("", ".bf16_attention"):
                if suffix:
                    round_attention(model)
                answers = [answer(model, prompt) for prompt in prompts(model.config.vocab_size)]
                found[f"{name}.tokens{suffix}"] = torch.stack([tokens for tokens, _ in answers])
                found[f"{name}.logits{suffix}"] = torch.stack([logits for _, logits in answers])
    save_file(
        found,
        REFERENCE,
        metadata={"transformers": transformers.__version__, "torch": torch.__version__},
    )


def round_attention(model: torch.nn.Module) -> None:
    """What a conversion with `--attention bf16` does to the dequantized projections."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            weight.copy_(weight.bfloat16())


if __name__ == "__main__":
    main()
