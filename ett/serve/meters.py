"""What Prometheus can read at ``/metrics``. Labels have few values, whatever strangers send."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Meters:
    """One server's figures, in a registry of its own.

    Attributes:
        requests: by route and HTTP status. seconds: from a request's head to the end of its response, by route.
        in_flight: requests that have no complete response yet. queued: of them, waiting for the model.
        batch_size: requests answered together, by kind of work. model_seconds: that the model took for them.
        prompt_tokens, completion_tokens, pictures: read, said, drawn or reconstructed.
    """

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("ett_requests", "Requests by route and HTTP status", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "ett_request_seconds", "Duration of requests", ["route"], buckets=_SECONDS, registry=own
        )
        self.in_flight = Gauge("ett_requests_in_flight", "Requests without a complete response", registry=own)
        self.queued = Gauge("ett_requests_queued", "Requests that wait for the model", registry=own)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram(
            "ett_batch_size", "Requests answered together", ["work"], buckets=sizes, registry=own
        )
        self.model_seconds = Histogram(
            "ett_model_seconds", "Duration of batches", ["work"], buckets=_SECONDS, registry=own
        )
        self.prompt_tokens = Counter("ett_prompt_tokens", "Positions read, pictures' among them", registry=own)
        self.completion_tokens = Counter("ett_completion_tokens", "Tokens said", registry=own)
        self.pictures = Counter("ett_pictures", "Pictures drawn or reconstructed", ["work"], registry=own)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
