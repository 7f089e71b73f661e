"""A made-up machine with a GPU on which models train, so that what comes after the measuring can be tested without."""

from flash_gsa.benchmarking import measurements, train
from flash_gsa.benchmarking.train_gate import measure_errors
from flash_gsa.benchmarking.train_profile import grouped, measure_profile
from flash_gsa.benchmarking.worker import Failed

from .made_up import ABOUT, cost

SLOWNESS = {("ours", "plain"): 1.0, ("ours", "compiled"): 0.8, ("llama", "plain"): 1.5, ("fla", "plain"): 1.25}
SPENT = {
    ("forward", "nvjet_tst_128x256"): (3.0, 50.0),
    ("loss", "nvjet_tst_128x256"): (1.0, 10.0),
    ("loss", "cunn_SoftMaxForward"): (1.0, 5.0),
    ("backward", "values_backward"): (2.0, 20.0),
    ("optimizer", "multi_tensor_apply_kernel"): (1.0, 6.0),
}


class MadeUpWorker:
    """Answers at once: a compiled Llama runs out of memory at 16384, FLA's values are wrong where `fla_wrong`."""

    def __init__(self, fla_wrong=False):
        self.fla_wrong, self.asked = fla_wrong, []

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        pass

    def call(self, function, *arguments, limit):
        if function is train.describe:
            return {"about": ABOUT | {"command": arguments[1]}, "device": "cuda:0", "peak_flops": 1e15}
        if function is measurements.measure_ceilings:
            copied = cost(1.0) | {"bytes": 10**12, "bytes_per_second": 3e12}
            product = cost(1.0) | {"size": 8192, "dtype": "bfloat16", "flops_per_second": 8e14}
            return {"copy": copied, "product": product}
        job = arguments[1]
        self.asked.append((function, job))
        if function is measure_errors:
            wrong = self.fla_wrong and job.implementation == "fla"
            return {"problem": "wrong: logits is off" if wrong else None, "errors": {"logits": (0.01, 0.05)}}
        if function is measure_profile:
            return {"problem": None, "milliseconds": 100.0} | grouped({k: list(v) for k, v in SPENT.items()})
        if (job.implementation, job.variant, job.length) == ("llama", "compiled", 16384):
            raise Failed("out of memory")
        seconds = 0.25 * SLOWNESS.get((job.implementation, job.variant), 1.0)
        rate = 16384 / seconds
        return {
            "problem": None,
            "first_step_seconds": 12.0,
            "seconds": seconds,
            "parts": {"forward": 0.3 * seconds, "backward": 0.6 * seconds, "optimizer": 0.1 * seconds},
            "tokens_per_second": rate,
            "flops_per_second": 8e9 * rate,
            "peak_bytes": 40 * 2**30,
        }


def cold_start(device, job, limit):
    return {"first": {"first_step_seconds": 80.0}, "second": {"first_step_seconds": 9.0}}


def made_up_result(monkeypatch, worker=None, **options):
    """What the benchmark finds on that machine."""
    monkeypatch.setattr(train, "measure_cold_start", cold_start)
    return train.benchmark(train.Options(**options), say=lambda line: None, worker=worker or MadeUpWorker())
