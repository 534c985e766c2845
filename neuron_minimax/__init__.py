"""FP8 mixture-of-experts models from their Hugging Face checkpoint to served tokens on AWS Neuron.

    import neuron_minimax as nm

    source = nm.Checkpoint.open("MiniMaxAI/MiniMax-M2")  # a directory, or a Hugging Face hub id
    print(source.inspect())
    converted = nm.plan_conversion(source).write("m2-neuron")
    print(nm.verify(source, converted))
    nm.compile(converted, "traced_model/m2", backend="cpu", seq_len=2048)
    llm = nm.LLM("traced_model/m2")
    print(llm.chat("What is the capital of France?").text)

Names are imported when they are first used, so that the package itself loads nothing heavy;
docs/api.md describes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_minimax.api import Checkpoint as Checkpoint
    from neuron_minimax.api import compile as compile
    from neuron_minimax.api import explain_fp8 as explain_fp8
    from neuron_minimax.api import read_tools as read_tools
    from neuron_minimax.backends.directory import load as load
    from neuron_minimax.backends.directory import verify_compiled as verify_compiled
    from neuron_minimax.backends.report import CompileMode as CompileMode
    from neuron_minimax.backends.report import CompileReport as CompileReport
    from neuron_minimax.config import ModelConfig as ModelConfig
    from neuron_minimax.convert.layout import AttentionPrecision as AttentionPrecision
    from neuron_minimax.convert.layout import FP8Range as FP8Range
    from neuron_minimax.convert.layout import Layout as Layout
    from neuron_minimax.convert.plan import ConversionPlan as ConversionPlan
    from neuron_minimax.convert.plan import Converted as Converted
    from neuron_minimax.convert.plan import plan_conversion as plan_conversion
    from neuron_minimax.convert.state_dict import (
        convert_hf_to_neuron_state_dict as convert_hf_to_neuron_state_dict,
    )
    from neuron_minimax.convert.state_dict import neuron_to_hf_state_dict as neuron_to_hf_state_dict
    from neuron_minimax.convert.torch_files import Imported as Imported
    from neuron_minimax.convert.torch_files import import_torch as import_torch
    from neuron_minimax.convert.verify import Verification as Verification
    from neuron_minimax.convert.verify import verify as verify
    from neuron_minimax.demo import DEMO as DEMO
    from neuron_minimax.device_check.check import check_device as check_device
    from neuron_minimax.errors import NeuronMiniMaxError as NeuronMiniMaxError
    from neuron_minimax.generation.chat import Chat as Chat
    from neuron_minimax.generation.events import CallArguments as CallArguments
    from neuron_minimax.generation.events import CallBegin as CallBegin
    from neuron_minimax.generation.events import CallEnd as CallEnd
    from neuron_minimax.generation.events import Content as Content
    from neuron_minimax.generation.events import Reasoning as Reasoning
    from neuron_minimax.generation.events import ReasoningEnd as ReasoningEnd
    from neuron_minimax.generation.generate import Answer as Answer
    from neuron_minimax.generation.generate import generate as generate
    from neuron_minimax.generation.llm import LLM as LLM
    from neuron_minimax.generation.llm import Reply as Reply
    from neuron_minimax.generation.sampling import SamplingParams as SamplingParams
    from neuron_minimax.generation.sampling import distinct_ratio as distinct_ratio
    from neuron_minimax.generation.tokenizer import TextTokenizer as TextTokenizer
    from neuron_minimax.inspection.document import write_text as write_text
    from neuron_minimax.inspection.precision import PrecisionReport as PrecisionReport
    from neuron_minimax.model.cache import BatchingCache as BatchingCache
    from neuron_minimax.model.cache import FullCache as FullCache
    from neuron_minimax.model.cache import KVCache as KVCache
    from neuron_minimax.model.comparison import compare_logits as compare_logits
    from neuron_minimax.model.decoder import Decoder as Decoder
    from neuron_minimax.model.masks import causal_mask as causal_mask
    from neuron_minimax.pipeline import Places as Places
    from neuron_minimax.pipeline import Watcher as Watcher
    from neuron_minimax.pipeline import make_ready as make_ready
    from neuron_minimax.pipeline import prepare as prepare
    from neuron_minimax.planner.report import plan_deployment as plan_deployment
    from neuron_minimax.progress import Progress as Progress
    from neuron_minimax.serving.server import ServerOptions as ServerOptions
    from neuron_minimax.serving.server import demo_model as demo_model
    from neuron_minimax.serving.server import serve as serve
    from neuron_minimax.studies.experts.batch import ReportOptions as ReportOptions
    from neuron_minimax.studies.experts.command import ExpertsRequest as ExpertsRequest
    from neuron_minimax.studies.experts.command import analyse_checkpoint as analyse_checkpoint
    from neuron_minimax.studies.experts.command import run_experts as run_experts
    from neuron_minimax.studies.explain.diagram import write_structure as write_structure
    from neuron_minimax.studies.explain.state_dict import walk_state_dict as walk_state_dict
    from neuron_minimax.studies.quality import measure_lengths as measure_lengths
    from neuron_minimax.studies.quality import measure_quality as measure_quality
    from neuron_minimax.training.command import parse_precision as parse_precision
    from neuron_minimax.training.command import train as train
    from neuron_minimax.training.data.corpus import write_corpus as write_corpus
    from neuron_minimax.training.data.sequences import DataOptions as DataOptions
    from neuron_minimax.training.data.tokenizer import make_tokenizer as make_tokenizer
    from neuron_minimax.training.guard import Guard as Guard
    from neuron_minimax.training.guard import OnBadStep as OnBadStep
    from neuron_minimax.training.options import TrainingOptions as TrainingOptions
    from neuron_minimax.training.request import TrainingRequest as TrainingRequest

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    # Checkpoints and their conversion.
    "Checkpoint": "api",
    "Converted": "convert.plan",
    "ConversionPlan": "convert.plan",
    "Layout": "convert.layout",
    "AttentionPrecision": "convert.layout",
    "FP8Range": "convert.layout",
    "plan_conversion": "convert.plan",
    "import_torch": "convert.torch_files",
    "Imported": "convert.torch_files",
    "verify": "convert.verify",
    "Verification": "convert.verify",
    "PrecisionReport": "inspection.precision",
    "compare_logits": "model.comparison",
    "convert_hf_to_neuron_state_dict": "convert.state_dict",
    "neuron_to_hf_state_dict": "convert.state_dict",
    # Models.
    "ModelConfig": "config",
    "Decoder": "model.decoder",
    "KVCache": "model.cache",
    "FullCache": "model.cache",
    "BatchingCache": "model.cache",
    "causal_mask": "model.masks",
    # Deployments.
    "plan_deployment": "planner.report",
    "compile": "api",
    "CompileReport": "backends.report",
    "CompileMode": "backends.report",
    "load": "backends.directory",
    "verify_compiled": "backends.directory",
    "check_device": "device_check.check",
    # The whole way.
    "make_ready": "pipeline",
    "prepare": "pipeline",
    "Places": "pipeline",
    "Watcher": "pipeline",
    # Text.
    "LLM": "generation.llm",
    "Reply": "generation.llm",
    "Answer": "generation.generate",
    "Chat": "generation.chat",
    "read_tools": "api",
    "SamplingParams": "generation.sampling",
    "TextTokenizer": "generation.tokenizer",
    "generate": "generation.generate",
    "distinct_ratio": "generation.sampling",
    "Reasoning": "generation.events",
    "ReasoningEnd": "generation.events",
    "Content": "generation.events",
    "CallBegin": "generation.events",
    "CallArguments": "generation.events",
    "CallEnd": "generation.events",
    # Serving.
    "serve": "serving.server",
    "ServerOptions": "serving.server",
    "demo_model": "serving.server",
    # Training.
    "train": "training.command",
    "TrainingRequest": "training.request",
    "TrainingOptions": "training.options",
    "Guard": "training.guard",
    "OnBadStep": "training.guard",
    "DataOptions": "training.data.sequences",
    "make_tokenizer": "training.data.tokenizer",
    "write_corpus": "training.data.corpus",
    "parse_precision": "training.command",
    # Studies.
    "measure_quality": "studies.quality",
    "measure_lengths": "studies.quality",
    "run_experts": "studies.experts.command",
    "analyse_checkpoint": "studies.experts.command",
    "ExpertsRequest": "studies.experts.command",
    "ReportOptions": "studies.experts.batch",
    "walk_state_dict": "studies.explain.state_dict",
    "explain_fp8": "api",
    "write_structure": "studies.explain.diagram",
    # Others.
    "DEMO": "demo",
    "write_text": "inspection.document",
    "Progress": "progress",
    "NeuronMiniMaxError": "errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])
