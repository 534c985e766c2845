"""What the server counts, for Prometheus; names after the prefix follow vLLM where vLLM has the
same thing.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PREFIX = "neuron_minimax"


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, namespace=PREFIX, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, registry=registry, buckets=buckets)

        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.running = gauge("num_requests_running", "Requests that hold a slot")
        self.kv_use = gauge(
            "kv_cache_usage_perc", "Share of all cache positions held by running requests, 0 to 1"
        )
        self.slots = gauge("slots", "Slots of the compiled model")
        self.load_seconds = gauge("model_load_seconds", "Time to load the compiled model")
        self.compile_seconds = gauge(
            "model_compile_seconds", "Time its compile took, from the manifest"
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", SECONDS
        )
        self.token_time = histogram(
            "time_per_output_token_seconds", "Between two tokens of a request", SHORT_SECONDS
        )
        self.request_time = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", SECONDS
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, reused ones included")
        self.cached_tokens = counter(
            "prefix_cache_hits", "Prompt tokens found in a slot and not encoded again"
        )
        self.output_tokens = counter("generation_tokens", "Tokens generated")
        self.encoded = counter("encode_positions", "Positions of context encoding, by use", "use")
        self.stepped = counter("step_slots", "Slots of token generation steps, by use", "use")
        self.finished = counter("request_success", "Answers finished, by reason", "finished_reason")
        self.errors = counter("request_errors", "Requests that failed, by kind", "kind")

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
