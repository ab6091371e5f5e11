"""``/metrics``: the shoal for Prometheus.

Figures that somebody counts anyway (tokens, passes, bytes) are read at each scrape, so they cost
the token path nothing. Only what a request took is observed, once, when it ends. Counters of a
stage begin again at 0 with each load, as Prometheus expects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.paces import counts_of, token_s
from coordinator.loading.state import STATES, Nothing
from coordinator.roster.members import Roster
from coordinator.serving.requests import InFlight, Requests
from wire.versions import shoal_version

Labels = TypeVar("Labels", bound=tuple[str, ...])

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Bounds of the histograms' buckets."""

TOKENS = {
    "prompt_tokens": "Prompt tokens of requests.",
    "cached_tokens": "Prompt tokens that a slot still had from before.",
    "answer_tokens": "Tokens of answers.",
    "drafted_tokens": "Tokens that were guessed, to be checked together.",
    "accepted_tokens": "Guessed tokens that were right.",
    "model_drafted_tokens": "Tokens that a draft model guessed.",
    "model_accepted_tokens": "Tokens that a draft model guessed rightly.",
}
"""The counts of a request that are added up by model."""

COUNTERS: dict[str, tuple[str, str, float]] = {
    "stage_passes": ("passes", "Forward passes of a stage since it was loaded.", 1),
    "stage_rows": ("rows", "Rows that a stage computed.", 1),
    "stage_compute_seconds": ("compute_us", "Time in which a stage computed.", 1e-6),
    "stage_wait_seconds": ("waited_us", "Time that rows waited for their pass.", 1e-6),
}
HOP_COUNTERS: dict[str, tuple[str, str, float]] = {
    "hop_frames": ("frames", "Rows, chunks and tokens sent to the next device.", 1),
    "hop_bytes": ("sent_bytes", "Bytes of rows sent to the next device.", 1),
    "hop_send_seconds": ("sending_us", "Time until the socket had taken them.", 1e-6),
}
"""Names of metrics, each with the field of StageCounts, the help text and the unit."""


class Metrics(Collector):
    """Collects the metrics of one coordinator, and answers ``/metrics``."""

    def __init__(self, roster: Roster, models: Models, requests: Requests) -> None:
        self._roster = roster
        self._models = models
        self._requests = requests
        self._ended: Counter[tuple[str, str]] = Counter()
        """Token counts of ended requests, by field and model."""
        self._statuses: Counter[tuple[str, str]] = Counter()
        """Ended requests, by path and status."""
        self._registry = CollectorRegistry()
        self._queued = self._histogram("queue_seconds", "Time until a request got a slot.")
        self._first = self._histogram(
            "time_to_first_token_seconds", "Time from a request's arrival to its first token."
        )
        self._token = self._histogram(
            "token_seconds", "A request's mean time between two tokens.", TOKEN_SECONDS
        )
        self._whole = self._histogram("request_seconds", "Time until the answer was complete.")
        self._registry.register(self)
        requests.subscribe(self._on_end)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(
            f"shoal_{name}", about, ["model"], registry=self._registry, buckets=buckets
        )

    def routes(self) -> list[Route]:
        return [Route("/metrics", self.metrics, methods=["GET"])]

    async def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": content_type})

    def _on_end(self, request: InFlight) -> None:
        self._statuses[request.path, str(request.status)] += 1
        if not request.model:
            return
        for field in TOKENS:
            self._ended[field, request.model] += getattr(request, field)
        for histogram, time_s in (
            (self._queued, request.started_s),
            (self._first, request.first_s),
            (self._whole, request.ended_s),
        ):
            if time_s is not None:
                histogram.labels(request.model).observe(time_s - request.arrived_s)
        if request.token_s is not None:
            self._token.labels(request.model).observe(request.token_s)

    # ---- at each scrape -------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics but the histograms."""
        yield _gauge("info", "The version of the coordinator.", {(shoal_version(),): 1}, "version")
        yield from self._of_requests()
        yield from self._of_models()
        yield from self._of_devices()
        found: dict[str, Metric] = {}
        for deployment in self._models.all_serving:
            for metric in _of_deployment(deployment):
                if metric.name in found:  # A name comes once, with the samples of all models.
                    found[metric.name].samples += metric.samples
                else:
                    found[metric.name] = metric
        yield from found.values()

    def _of_requests(self) -> Iterator[Metric]:
        totals = self._ended.copy()
        states: Counter[tuple[str]] = Counter({("waiting",): 0, ("prompt",): 0, ("answering",): 0})
        for request in self._requests.in_flight:
            states[(request.state,)] += 1
            for field in TOKENS if request.model else ():
                totals[field, request.model] += getattr(request, field)
        for field, about in TOKENS.items():
            values = {(model,): total for (name, model), total in totals.items() if name == field}
            yield _counter(field, about, values, "model")
        yield _counter("requests", "Ended requests for answers.", self._statuses, "path", "status")
        yield _gauge("requests_in_flight", "Requests that have not ended.", states, "state")

    def _of_models(self) -> Iterator[Metric]:
        words = {state.word for state in STATES if state is not Nothing}
        states = {
            (name, word): float(state.word == word)
            for name, state in self._models.present()
            for word in words
        }
        yield _gauge("model_state", "1 for the state that a model is in.", states, "model", "state")

    def _of_devices(self) -> Iterator[Metric]:
        members = self._roster.members
        yield _gauge("devices", "Devices that have joined.", {(): len(members)})
        for name, about, values in (
            ("load", "Share of the processor in use.", [member.load for member in members]),
            (
                "memory_available_bytes",
                "Memory that programs can still take.",
                [member.memory_available_bytes for member in members],
            ),
            (
                "temperature_celsius",
                "Temperature of the hottest part.",
                [member.celsius for member in members],
            ),
        ):
            known = {
                (member.name,): value
                for member, value in zip(members, values, strict=True)
                if value is not None
            }
            yield _gauge(f"device_{name}", about, known, "device")


def _of_deployment(deployment: Deployment) -> Iterator[Metric]:
    model, slots = deployment.name, deployment.slots
    if not deployment.spec.encodes:  # It has no KV cache.
        kinds = {(model, "used"): slots.used, (model, "free"): slots.total - slots.used}
        yield _gauge("slots", "KV slots, each for one answer.", kinds, "model", "kind")
        waiting = {(model,): slots.waiting}
        yield _gauge("queue_length", "Requests in line for a slot.", waiting, "model")
    yield from _of_stages(deployment)
    yield from _of_hops(deployment)


def _of_stages(deployment: Deployment) -> Iterator[Metric]:
    """Figures of each stage by its lead's name, and of each device of a team."""
    model, leads = deployment.name, deployment.leads
    found = [(lead.name, counts_of(deployment, lead)) for lead in leads]
    counted = [(name, counts) for name, counts in found if counts is not None]
    for metric, (field, about, unit) in COUNTERS.items():
        values = {(name, model): unit * getattr(counts, field) for name, counts in counted}
        yield _counter(metric, about, values, "device", "model")
    if not deployment.spec.encodes:
        held = {(name, model): counts.held_rows for name, counts in counted}
        most = {(name, model): counts.most_rows for name, counts in counted}
        about = "Rows in the KV cache that sequences hold."
        yield _gauge("kv_rows", about, held, "device", "model")
        yield _gauge("kv_rows_limit", "Rows that fit the KV cache.", most, "device", "model")
    paces = {
        (member.name, model): pace
        for member in deployment.devices
        if (pace := token_s(deployment, member)) is not None
    }
    planned = {
        (lead.name, model): stage.compute_s
        for lead, stage in zip(leads, deployment.plan.stages, strict=True)
    }
    about = "Mean time of a device's last tokens."
    yield _gauge("stage_token_seconds", about, paces, "device", "model")
    about = "Predicted time of a stage's token."
    yield _gauge("stage_token_predicted_seconds", about, planned, "device", "model")


def _of_hops(deployment: Deployment) -> Iterator[Metric]:
    """Figures of the way from each lead to the next one."""
    model, leads = deployment.name, deployment.leads
    if len(leads) == 1:
        return
    ways = [
        (lead.name, target.name, counts_of(deployment, lead))
        for lead, target in zip(leads, (*leads[1:], leads[0]), strict=True)
    ]
    counted = [
        ((source, target, model), counts) for source, target, counts in ways if counts is not None
    ]
    for metric, (field, about, unit) in HOP_COUNTERS.items():
        values = {way: unit * getattr(counts, field) for way, counts in counted}
        yield _counter(metric, about, values, "source", "target", "model")
    trips = {way: 1e-6 * counts.round_trip_us for way, counts in counted if counts.round_trip_us}
    about = "Newest measured round trip of a hop's link."
    yield _gauge("hop_round_trip_seconds", about, trips, "source", "target", "model")
    plan = deployment.plan
    predicted = [*(hop.seconds for hop in plan.hops), plan.return_s]
    values = {(*way[:2], model): seconds for way, seconds in zip(ways, predicted, strict=True)}
    about = "Predicted time of a token's row on a hop."
    yield _gauge("hop_predicted_seconds", about, values, "source", "target", "model")


def _counter(name: str, about: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    return _filled(CounterMetricFamily(f"shoal_{name}", about, labels=labels), values)


def _gauge(name: str, about: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(f"shoal_{name}", about, labels=labels), values)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Labels, float]
) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
