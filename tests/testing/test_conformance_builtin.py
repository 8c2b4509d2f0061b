"""The parts of the core pass the suites that outsiders' parts have to pass."""

from __future__ import annotations

from hypothesis import settings

from core import testing
from core.builtin import core_register_executors, core_register_launchers, core_register_samplers
from core.model.families import BUILTIN_MODELS
from core.registry import KINDS
from core.testing.checkpoints import FAMILIES, make_checkpoint
from core.testing.events import SubscriberConformance
from core.testing.executor import ExecutorConformance
from core.testing.frontend import FrontendConformance, ServerConformance
from core.testing.launcher import LauncherConformance
from core.testing.model import ModelConformance
from core.testing.plugin import watch_import
from core.testing.sampler import SamplerConformance
from plugins.frontend import openai, playground
from plugins.observe import log, prometheus
from plugins.server import http

(SAMPLER,) = core_register_samplers()
OPENAI = {openai.NAME: openai.OpenAISettings()}
PLAYGROUND = {playground.NAME: playground.PlaygroundSettings()}
PROMETHEUS = {prometheus.NAME: prometheus.PrometheusSettings()}
HTTP = {http.NAME: http.HttpSettings()}
LOG_EVERYTHING = {log.NAME: log.LogSettings(requests=True)}
(LAUNCHER,) = core_register_launchers()
(EXECUTOR,) = core_register_executors()


SUITES = {
    "attention": ["AttentionConformance"],
    "quant": ["QuantizerConformance"],
    "parallel": ["TensorParallelConformance", "PipelineParallelConformance"],
    "scheduler": ["SchedulerConformance"],
    "kv_cache": ["KVCacheConformance"],
    "executor": ["ExecutorConformance"],
    "launcher": ["LauncherConformance"],
    "model": ["ModelConformance"],
    "frontend": ["FrontendConformance"],
    "server": ["ServerConformance"],
    "sampler": ["SamplerConformance"],
}


def test_every_kind_has_a_suite():
    assert SUITES.keys() == KINDS.keys()
    named = {name for names in SUITES.values() for name in names}
    others = {"AllocatorConformance", "PluginConformance", "SubscriberConformance"}
    assert set(testing.__all__) == named | others
    for name in testing.__all__:
        suite = getattr(testing, name)
        assert any(law.startswith("test_") for law in dir(suite)), name


def test_the_kit_does_not_wait_for_torch():
    assert "torch" not in watch_import("core.testing")["modules"]


class TestSampler(SamplerConformance):
    entry = SAMPLER
    settings = settings(SamplerConformance.settings, max_examples=12)


class OfFamily:
    variant = ""

    @property
    def entry(self):
        model_type = FAMILIES[self.variant].model_type
        (entry,) = [entry for entry in BUILTIN_MODELS if model_type in entry.model_types]
        return entry

    def make_checkpoint(self, path):
        return make_checkpoint(self.variant, path)


class TestLlama(OfFamily, ModelConformance):
    variant = "llama-bias"


class TestPhi(OfFamily, ModelConformance):
    """Projections that are stored fused."""

    variant = "phi3-sliding"


class TestGemma(OfFamily, ModelConformance):
    """Norms after the layers' halves, a tied head, names of their own."""

    variant = "gemma3-multimodal"


class TestExecutor(ExecutorConformance):
    entry = EXECUTOR


class TestLog(SubscriberConformance):
    module = "plugins.observe.log"
    plugin_settings = LOG_EVERYTHING


class TestOpenAI(FrontendConformance):
    (entry,) = openai.core_register_frontends()
    plugin_settings = OPENAI


class TestPlayground(FrontendConformance):
    (entry,) = playground.core_register_frontends()
    plugin_settings = PLAYGROUND
    undocumented = frozenset(
        {"/", "/playground/events"}
        | {f"/playground/{name}" for name in ("app.js", "client.js", "live.js", "style.css")}
    )


class TestPrometheus(FrontendConformance):
    (entry,) = prometheus.core_register_frontends()
    plugin_settings = PROMETHEUS


class TestHttp(ServerConformance):
    (entry,) = http.core_register_servers()
    plugin_settings = HTTP


class TestLauncher(LauncherConformance):
    entry = LAUNCHER
