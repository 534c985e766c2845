"""The loss curve of a run as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.errors import TrainingError


def require_matplotlib() -> None:
    """Raises TrainingError before a long run rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError(
            "the loss curve needs matplotlib; pip install 'neuron-minimax[plots]'"
        ) from None


def plot_losses(losses: Sequence[float], path: Path, window: int = 50) -> None:
    """Write the loss per step (nats per learned token) and its running mean over `window` steps, on
    a log scale.
    """
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    means = [sum(part := losses[max(0, step - window) : step]) / len(part) for step in steps]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="per step")
    axes.plot(steps, means, color="tab:blue", linewidth=1.5, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
