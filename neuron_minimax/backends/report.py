"""What is asked of a compile beside its options, and what it says when it is done."""

from dataclasses import dataclass
from pathlib import Path

from neuron_minimax.backends.manifest import HARD_LINKS, Manifest
from neuron_minimax.backends.model_files import model_directory
from neuron_minimax.inspection.document import Rendered


@dataclass(frozen=True, kw_only=True)
class CompileMode:
    """How a compile goes about it, whatever it makes.

    force          makes graphs in any case
    check          reads all bytes of a compile that is there, and makes again what is damaged, from
                   a converted directory all bytes of which are read first
    copy_weights   keeps copies of the weights, so that the directory needs no other one
    """

    force: bool = False
    check: bool = False
    copy_weights: bool = False


PLAIN = CompileMode()


@dataclass(frozen=True, kw_only=True)
class CompileReport(Rendered):
    """The outcome of a compile.

    `reason` says why graphs were made, "" when they were up to date; `refreshed` why the model's
    files were then taken over again, "" when they were up to date too. `seconds` is what this run
    took; when it has made graphs, the manifest's `compile_seconds`.
    """

    directory: Path
    manifest: Manifest
    reason: str
    refreshed: str = ""
    seconds: float

    def render(self) -> str:
        return "\n".join([*self._course(), *self._weights()])

    def _weights(self) -> list[str]:
        """Say where the weights are, unless they are hard links, which need nothing."""
        if self.manifest.weights == HARD_LINKS:
            return []
        place = model_directory(self.directory, self.manifest)
        if self.manifest.holds_weights:
            return [f"  its weights are copies, in {place}: it needs no other directory"]
        return [
            f"  its weights stay in {place}, which hard links do not reach: do not move or delete "
            "that, or compile with --copy-weights"
        ]

    def _course(self) -> list[str]:
        if self.refreshed:
            return [
                f"{self.directory}: took over the model's files ({self.refreshed}); its graphs are "
                f"up to date ({self.seconds:.1f} s)"
            ]
        if not self.reason:
            return [f"{self.directory} is up to date ({self.seconds:.1f} s)"]
        lines = [f"compiled into {self.directory} in {self.seconds:.1f} s ({self.reason})"]
        lines += [
            f"  {name}: {graph.seconds:.1f} s"
            for name, graph in self.manifest.graphs.items()
            if graph.seconds
        ]
        lines += [f"  {note}" for note in self.manifest.notes]
        return lines
