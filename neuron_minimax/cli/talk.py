"""Talking to a model at a terminal, or in lines from a pipe: messages, commands, interruptions."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import neuron_minimax as nm
from neuron_minimax.cli.ending import say, show
from neuron_minimax.cli.turns import TurnPrinter, show_note
from neuron_minimax.errors import GenerationError, NeuronMiniMaxError, counted, printable
from neuron_minimax.processes import Terminated, first_signal_noted

PROMPT = "you> "
MORE = "...> "
FENCE = "```"
# From this share of the context on each turn is followed by what is left of it.
NEARLY_FULL = 0.75
HELP = """\
/help             this
/reset            a new conversation, under the same system message and with the same tools
/regenerate       answer the last message again
/system [TEXT]    show the system message, or replace it; "" takes it away
/tools [FILE]     show the tools, or take others from a JSON file; "" takes them away
/save FILE        write the conversation as JSON, in the form of a request to OpenAI's chat API
/quit             end; so does Ctrl-D

A message of several lines: end a line with a backslash, or open a block with ``` and close it with
```, or paste. A message that begins with a slash: put a space before it. Ctrl-C stops an answer,
and what was said stays. The result of a tool call is typed as a message is; Ctrl-C leaves it out.
Nothing of the conversation is dropped: when it nears the end of the context, you are told."""

Stopped = Callable[[], bool]


class Lines:
    """Messages from standard input; what a pipe holds is shown as a terminal would show it."""

    def __init__(self) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        if self.interactive:
            with suppress(ImportError):
                import readline  # with which input() edits lines

                # A paste comes whole, its line ends included; Python switches that off.
                readline.parse_and_bind("set enable-bracketed-paste on")
        # Bytes that are no text are refused by name, where they are used.
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")

    def message(self, prompt: str) -> str:
        """Return the next message of one or more lines. Raises EOFError at the end."""
        lines: list[str] = []
        fenced = False
        while True:
            try:
                line = self._line(MORE if lines else prompt)
            except EOFError:
                if not lines:
                    raise
                return "\n".join(lines)
            mark = line.strip().startswith(FENCE) or line.strip().endswith(FENCE)
            if (fenced or mark) and line.count(FENCE) % 2:
                fenced = not fenced
            goes_on = line.endswith("\\") and not fenced
            lines.append(line[:-1] if goes_on else line)
            if not goes_on and not fenced:
                return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        line = "" if sys.stdin is None else sys.stdin.readline()
        if not line:
            raise EOFError
        text = line.removesuffix("\n").removesuffix("\r")
        show(prompt + text)
        return text


@dataclass
class Talk:
    """One talk over a Chat, from the first message to the end of the input.

    An answer has at most `max_new_tokens`. `reasoning`: whether it is shown. `name` is the model's.
    """

    chat: "nm.Chat"
    name: str
    max_new_tokens: int | None = None
    reasoning: bool = True

    def __post_init__(self) -> None:
        self.lines = Lines()
        self.failed = False
        self._hinted = False
        self._again = 0
        self._saved: set[Path] = set()

    def run(self) -> int:
        """Talk until the input ends or `/quit`; return the exit code: 1 when a line of a pipe could
        not be answered.
        """
        if self.lines.interactive:
            positions = self.chat.llm.backend.capabilities.seq_len
            show_note(f"{self.name}, a context of {positions:,} tokens; /help says what there is")
        while (text := self._next()) is not None:
            try:
                self._take(text)
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (NeuronMiniMaxError, OSError) as error:
                self.failed = True
                say(f"error: {error}")
                self._tell_context()
            except KeyboardInterrupt as stop:
                if isinstance(stop, Terminated) or not self.lines.interactive:
                    raise
        return 1 if self.failed and not self.lines.interactive else 0

    def _next(self) -> str | None:
        """Return the next message or command; None at the end."""
        try:
            text = self.lines.message(PROMPT)
        except EOFError:
            if self.lines.interactive:
                show("")
            return None
        except KeyboardInterrupt as stop:
            if self._hinted or not self.lines.interactive or isinstance(stop, Terminated):
                raise
            self._hinted = True
            show_note("\n(Ctrl-C once more ends the conversation, as Ctrl-D does)")
            return ""
        self._hinted = False
        return None if text.strip() == "/quit" else text

    def _take(self, text: str) -> None:
        """Answer a message or do a command. Raises NeuronMiniMaxError."""
        if not text.strip():
            return
        if not text.startswith("/"):
            self._answer(lambda stopped: self.chat.say(text.strip(), self.max_new_tokens, stopped))
            return
        name, _, rest = text.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: show(HELP),
            "/reset": self._reset,
            "/regenerate": self._regenerate,
            "/system": self._system,
            "/tools": self._tools,
            "/save": self._save,
        }
        if name not in commands:
            raise GenerationError(
                f"{name} is no command; /help lists them, and a space before the slash makes it a "
                "message"
            )
        commands[name](rest.strip())

    def _answer(self, begin: Callable[[Stopped], Iterator[object]]) -> None:
        """Show a turn, and the turns after the results of its calls."""
        whole = self._turn(begin)
        while whole and self.chat.last.tool_calls:
            results = self._results()
            if results is None:
                return
            whole = self._turn(
                lambda stopped, given=results: self.chat.give_results(  # type: ignore[misc]
                    given, self.max_new_tokens, stopped
                )
            )

    def _turn(self, begin: Callable[[Stopped], Iterator[object]]) -> bool:
        """Show one turn until it ends or Ctrl-C stops it; say whether it was not stopped."""
        start = time.monotonic()
        stopped = False
        try:
            with TurnPrinter(reasoning=self.reasoning) as printer, first_signal_noted() as noted:
                for event in begin(lambda: noted.number is not None):
                    printer.add(event)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not self.lines.interactive:
                raise
            stopped = True
        self._remark(stopped, time.monotonic() - start)
        return not stopped

    def _remark(self, stopped: bool, seconds: float) -> None:
        """Say how a turn ended, and how much of the context is left when it nears its end."""
        last = self.chat.last
        count = len(last.token_ids)
        positions = self.chat.llm.backend.capabilities.seq_len
        if stopped:
            kept = "what was said stays" if count else "nothing was said, and nothing stays"
            self._note(f"(stopped; {kept})")
        elif last.finish_reason == "length" and count == self.max_new_tokens:
            self._note(f"(cut off after {counted(count, 'token')}: --max-new-tokens)")
        elif last.finish_reason == "length":
            self._note(
                f"(cut off: the context of {positions:,} tokens is full; /reset begins anew)"
            )
        elif self.lines.interactive:
            self._note(f"({counted(count, 'token')}, {count / max(seconds, 1e-9):.1f} tokens/s)")
        self._tell_context()

    def _tell_context(self) -> None:
        """Say how much of the context is taken when that is most of it."""
        positions = self.chat.llm.backend.capabilities.seq_len
        with suppress(GenerationError):  # what is wrong with the messages the next turn tells
            used = len(self.chat.next_turn().prompt_ids)
            if used > NEARLY_FULL * positions:
                self._note(
                    f"(the conversation takes {used:,} of the context's {positions:,} tokens; "
                    "when it is full, no message fits any more: /reset begins anew)"
                )

    def _results(self) -> list[str] | None:
        """Ask for the result of each call of the last turn; None when they are left out."""
        calls = self.chat.last.tool_calls
        try:
            return [
                self.lines.message(f"result of {printable(call.name, kept='')}> ") for call in calls
            ]
        except (EOFError, KeyboardInterrupt) as stop:
            if isinstance(stop, Terminated) or not self.lines.interactive:
                if isinstance(stop, KeyboardInterrupt):
                    raise
                raise GenerationError(
                    f"the input ended before the result of {calls[0].name}; it is the line after "
                    "the call"
                ) from None
            show_note("\n(no result was given)")
            return None

    def _note(self, text: str) -> None:
        """Print a remark: beside the answers of a pipe, on standard error."""
        if self.lines.interactive:
            show_note(text)
        else:
            say(text)

    def _reset(self, rest: str) -> None:
        self.chat.reset()
        self._note("(a new conversation)")

    def _regenerate(self, rest: str) -> None:
        chat = self.chat
        params = chat.params
        if params is not None and params.temperature == 0:
            self._note("(the most probable tokens are chosen: the answer will be the same)")
        self._again += 1
        if params is not None and params.seed is not None:
            chat.params = replace(params, seed=params.seed + self._again)
        try:
            self._answer(lambda stopped: chat.answer_again(self.max_new_tokens, stopped))
        finally:
            chat.params = params

    def _system(self, text: str) -> None:
        if text:
            self._change("system", "" if text == '""' else text)
        self._note(f"(system message: {self.chat.system})" if self.chat.system else "(none)")

    def _tools(self, name: str) -> None:
        if name:
            self._change("tools", None if name == '""' else nm.read_tools(name))
        tools = [tool["function"]["name"] for tool in self.chat.tools or ()]
        self._note(f"(tools: {', '.join(tools)})" if tools else "(no tools)")

    def _change(self, what: str, value: object) -> None:
        """Change a part of every prompt. Raises GenerationError, and leaves it as it was, when the
        chat template does not take it.
        """
        before = getattr(self.chat, what)
        setattr(self.chat, what, value)
        try:
            self.chat.next_turn()
        except NeuronMiniMaxError:
            setattr(self.chat, what, before)
            raise

    def _save(self, name: str) -> None:
        if not name:
            raise GenerationError("/save needs the name of a file to write")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise GenerationError(f"{path} exists; name another file")
        saved = {"model": self.name, **self.chat.as_request()}
        nm.write_text(path, json.dumps(saved, indent=2) + "\n")
        self._saved.add(path.resolve())
        self._note(f"({counted(len(self.chat.messages), 'message')} saved in {path})")
