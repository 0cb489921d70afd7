"""Metrics in Prometheus' format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from uhd_export.runtime.serving.scheduling.request import Summary
from uhd_export.runtime.serving.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts answers as they end, and reads the rest from the service when it is asked."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = self.registry
        self._requests = Counter("uhd_requests", "Requests by how they ended.", ["outcome"], registry=own)
        self._tokens = Counter("uhd_tokens", "Positions, by what they were.", ["kind"], registry=own)
        self._images = Counter("uhd_images", "Images asked about.", ["encoded"], registry=own)
        self._stages = Histogram(
            "uhd_stage_seconds", "Seconds of a request by stage.", ["stage"], buckets=_SECONDS, registry=own
        )
        self._first = Histogram(
            "uhd_first_token_seconds", "Seconds to the first token.", buckets=_SECONDS, registry=own
        )
        self.registry.register(_ServiceCollector(service))
        service.scheduler.listeners.append(self.ended)

    def refused(self, outcome: str) -> None:
        """A request was not taken."""
        self._requests.labels(outcome).inc()

    def ended(self, summary: Summary) -> None:
        """An answer ended; any thread may tell."""
        self._requests.labels(summary.reason).inc()
        self._tokens.labels("prompt").inc(summary.prompt_tokens - summary.cached_tokens)
        self._tokens.labels("prompt_cached").inc(summary.cached_tokens)
        self._tokens.labels("answer").inc(summary.completion_tokens)
        self._images.labels("before").inc(summary.cached_images)
        self._images.labels("now").inc(summary.images - summary.cached_images)
        for stage, seconds in summary.seconds.items():
            self._stages.labels(stage).observe(seconds)
        if summary.first_token is not None:
            self._first.observe(summary.first_token)

    def text(self) -> bytes:
        """All of it, as it is scraped."""
        return generate_latest(self.registry)


class _ServiceCollector:
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """What the service knows at this moment."""
        service, scheduler = self._service, self._service.scheduler
        gauges = {
            "uhd_waiting_requests": ("Requests without a slot.", scheduler.waiting),
            "uhd_busy_slots": ("Slots in use.", scheduler.busy_slots),
            "uhd_slots": ("Slots.", service.options.slots),
            "uhd_image_cache_bytes": ("Encoded images that are kept.", service.encoded.nbytes),
            "uhd_slot_cache_bytes": ("Key-value cache that is reserved.", service.memory.cache),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily("uhd_decode_steps", "Steps of all running answers.", scheduler.steps)
        yield CounterMetricFamily("uhd_decode_tokens", "Tokens that steps made.", scheduler.stepped)
