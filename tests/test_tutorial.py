"""Every command of docs/tutorial.md, in its order, in one folder."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from neuron_minimax.backends import made_demo
from neuron_minimax.backends.cpu import options as cpu_options
from neuron_minimax.cli import main
from tests.full_size import write_sparse
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
SHORTER = ("--steps 600", "--steps 2 --warmup-steps 1")
WANTED = {  # what a command has to say, on either stream
    "run": "= 81",
    "chat": "you>",
    "train": "mine",
    "inspect": "Usable as it is",
    "verify": "verified",
    "plan": "fits: ",
}


def test_every_command_of_the_tutorial_does_what_the_page_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(made_demo, "user_cache", lambda: tmp_path / "cache")
    # Without a compiler the exported graphs run: seconds, where compiled ones take a minute.
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu_options, "DEFAULT_CPU_BUCKETS", (64,))
    write_sparse(tmp_path / "MiniMax-M2")
    for block in BLOCKS:
        if block.startswith(("neuron-minimax serve", "curl")):
            continue
        for line in block.replace(*SHORTER).splitlines():
            _, command, *arguments = shlex.split(line)
            if command == "convert" and arguments[0] == "MiniMax-M2":
                # What scales mean is seen from values, and the large one here is a hole.
                shutil.rmtree("MiniMax-M2")
                write_tiny(tmp_path / "MiniMax-M2")
            monkeypatch.setattr("sys.stdin", io.StringIO("What is 45 + 36?\n/quit\n"))
            code = main([command, *arguments])
            out, err = capfd.readouterr()
            assert code == 0, f"{line}\n{out}\n{err}"
            assert WANTED.get(command, "") in out + err, f"{line}\n{out}\n{err}"
    _ask_the_server(tmp_path)


def _ask_the_server(directory: Path) -> None:
    (serve,) = (block for block in BLOCKS if block.startswith("neuron-minimax serve"))
    (curl,) = (block for block in BLOCKS if block.startswith("curl"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", *serve.replace("-", "_", 1).split(), "--port", "0"],
        cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said = ""
        while "listening" not in said:
            line = server.stdout.readline()
            assert line, said
            said += line
        address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        _, url, _, header, _, question = shlex.split(curl)
        url = url.replace("http://127.0.0.1:8000", address)
        name, value = header.split(": ")
        answer = httpx.post(url, headers={name: value}, content=question, timeout=600)
        assert answer.json()["choices"][0]["message"]["role"] == "assistant", answer.text
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert server.returncode == 0, said
