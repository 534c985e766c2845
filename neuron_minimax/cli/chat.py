"""Commands about answers: chat, generate; and the options that they share with others."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import TracedDir, app
from neuron_minimax.cli.ending import say, show, show_words
from neuron_minimax.cli.models import parse_integers
from neuron_minimax.cli.progress import Shown
from neuron_minimax.cli.talk import Talk
from neuron_minimax.cli.turns import TurnPrinter, parts_of, say_if_cut
from neuron_minimax.errors import GenerationError, shortened

PROMPT_BYTES = 16 << 20
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="most tokens of one answer")]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking", help="whether to reason; where the chat template can say so"
    ),
]
ShowReasoning = Annotated[
    bool, typer.Option("--reasoning/--no-reasoning", help="whether the reasoning is shown")
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='the chat template\'s own arguments: {"enable_thinking": false}'
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="tools that the model may call, in OpenAI's form"),
]
System = Annotated[str, typer.Option(metavar="TEXT", help="system message")]


def template_arguments(thinking: bool | None, text: str | None = None) -> dict[str, Any] | None:
    """Return the chat template's arguments that options give: a switch, and a JSON object.

    Raises BadParameter for a text that is none.
    """
    given: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        named = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        named = None
    if not isinstance(named, dict):
        raise typer.BadParameter(
            f"--chat-template-kwargs is {shortened(repr(text))}; expected a JSON object such as "
            '{"enable_thinking": false}'
        )
    return given | named or None


def read_prompt(path: Path) -> str:
    """Return the message in a file, or in standard input for "-", without the line end behind it.

    Raises GenerationError for what is no text in UTF-8, empty, too long, or cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = _bytes_of(path)
        if len(data) > PROMPT_BYTES:
            raise GenerationError(
                f"the prompt in {name} is longer than {PROMPT_BYTES >> 20} MiB; expected a message"
            )
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise GenerationError(f"the prompt in {name} cannot be read: {reason}") from None
    return checked_prompt(text, f"the prompt in {name}").removesuffix("\n")


def checked_prompt(text: str, name: str = "--prompt") -> str:
    """Return a message. Raises GenerationError where it says nothing."""
    if not text.strip():
        raise GenerationError(f"{name} is empty; expected a message")
    return text


def _bytes_of(path: Path) -> bytes:
    if str(path) != "-":
        with path.open("rb") as file:
            return file.read(PROMPT_BYTES + 1)
    if sys.stdin is None:  # of a process that was started without one
        raise GenerationError("there is no standard input; give --prompt, or a file")
    return sys.stdin.buffer.read(PROMPT_BYTES + 1)


def sampling_options(**asked: float | None) -> dict[str, Any]:
    """Return the sampling options that were given; one that cannot be is refused here, before a
    model is loaded. Raises GenerationError.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    nm.SamplingParams(**given)  # type: ignore[arg-type]
    return given


def talk(chat: "nm.Chat", name: str, max_new_tokens: int | None, reasoning: bool = True) -> int:
    """Talk until the input ends; return the exit code. What every prompt will hold is tried first.

    Raises GenerationError when the chat template does not take it.
    """
    chat.next_turn()
    return Talk(chat, name, max_new_tokens, reasoning).run()


@app.command()
def chat(
    traced: TracedDir,
    system: System = "",
    tools: Tools = None,
    thinking: Thinking = None,
    reasoning: ShowReasoning = True,
    chat_template_kwargs: TemplateKwargs = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable token")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Talk to a compiled model, or answer each line of a pipe; /help says what there is.

    Sampling defaults are the checkpoint's own.
    """
    given = sampling_options(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    arguments = template_arguments(thinking, chat_template_kwargs)
    offered = None if tools is None else nm.read_tools(tools)
    say(f"loading {traced}")
    one = nm.Chat(
        nm.LLM(traced, progress=Shown()),
        system=system,
        tools=offered,
        chat_template_kwargs=arguments,
    )
    one.params = replace(one.next_turn().sampling, **given)
    raise typer.Exit(talk(one, traced.resolve().name, max_new_tokens, reasoning))


@app.command()
def generate(
    traced: TracedDir,
    prompt: Annotated[
        str | None,
        typer.Option(help="a user's message, put through the chat template unless --raw"),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="the message in a file; - is standard input"),
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="prompt tokens, taken as they are")
    ] = None,
    system: System = "",
    tools: Tools = None,
    thinking: Thinking = None,
    reasoning: ShowReasoning = True,
    chat_template_kwargs: TemplateKwargs = None,
    max_new_tokens: MaxNewTokens = None,
    greedy: Annotated[bool, typer.Option("--greedy")] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="text that the answer ends before; may be repeated"),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print the tokens, their text, and of a message its parts"),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="go on from the prompt as plain text: no chat template, nothing set apart"
        ),
    ] = False,
    dump_logits: Annotated[Path | None, typer.Option(metavar="FILE.safetensors")] = None,
) -> None:
    """Generate from a compiled directory; sampling defaults are the checkpoint's own."""
    if [prompt, prompt_file, token_ids].count(None) != 2:
        raise typer.BadParameter("give one of --prompt, --prompt-file and --token-ids")
    if stop and not all(stop):
        raise typer.BadParameter("--stop is empty; expected a text that ends the answer")
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)
    elif prompt is not None:
        prompt = checked_prompt(prompt)
    plain = prompt is None or raw
    if plain and (thinking is not None or tools or system or chat_template_kwargs):
        raise typer.BadParameter(
            "--system, --tools, --chat-template-kwargs, --thinking and --no-thinking are for the "
            "chat template, which --raw and --token-ids leave out"
        )
    if not reasoning and (plain or as_json):
        raise typer.BadParameter("--no-reasoning is of what --prompt prints as text, without --raw")
    given = sampling_options(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    excluded = sorted(given.keys() - {"seed"})
    if greedy and excluded:
        raise GenerationError(
            f"--greedy excludes --{excluded[0].replace('_', '-')}; give one or the other",
            usage=True,
        )
    arguments = template_arguments(thinking, chat_template_kwargs)
    offered = None if tools is None else nm.read_tools(tools)
    prompt_ids = parse_integers("--token-ids", token_ids) if token_ids is not None else []
    llm = nm.LLM(traced, progress=Shown())
    messages = [{"role": "system", "content": system}] if system else []
    if not plain:
        messages.append({"role": "user", "content": prompt or ""})
    sampling = llm.sampling if plain else llm.turn(messages, offered, arguments).sampling
    base = nm.SamplingParams(temperature=0.0) if greedy else sampling
    params = replace(base, stop=tuple(stop or ()), **given)
    if plain:
        answer = llm.generate(
            prompt_ids if prompt is None else prompt,
            params,
            max_new_tokens=max_new_tokens,
            on_text=lambda text: None if as_json else show_words(text),
            dump_logits=dump_logits,
        )
        show(json.dumps({"token_ids": answer.token_ids, "text": answer.text}) if as_json else "")
        _say_ending(answer, max_new_tokens, dump_logits)
        return
    printer = TurnPrinter(reasoning=reasoning)
    with printer:
        reply = llm.chat(
            messages,
            params,
            offered,
            max_new_tokens=max_new_tokens,
            chat_template_kwargs=arguments,
            on_event=(lambda event: None) if as_json else printer.add,
            dump_logits=dump_logits,
        )
    if as_json:
        text = llm.tokenizer.decode(reply.token_ids)
        show(json.dumps({"token_ids": reply.token_ids, "text": text, **parts_of(reply)}))
    _say_ending(reply, max_new_tokens, dump_logits)


def _say_ending(
    answer: "nm.Answer | nm.Reply", max_new_tokens: int | None, logits: Path | None
) -> None:
    """Say on standard error what is cut off, and where the logits are."""
    say_if_cut(answer, max_new_tokens)
    if logits is not None:
        say(f"logits: {logits}")
