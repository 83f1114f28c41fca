"""The cost model: it recovers what it is made of, and the shipped one is whole."""

import pytest
import torch

from sparsetrain.kernels import costs

SIZES = [
    costs.Size(d, d, n, int(d * d * rho), token_major)
    for d in (256, 1024, 4096) for n in (512, 8192) for rho in (0.001, 0.01, 0.1) for token_major in (False, True)
]  # fmt: skip


def test_fit_recovers_the_coefficients_it_was_made_from():
    common = {"call": 1e-5, "multiply": 2e-12, "activation": 3e-10, "nonzero": 0.0}
    for backend, own in (("cpu", {"entry": 0.0, "convert": 2e-10}), ("reference", {"entry": 4e-9, "convert": 0.0})):
        true = common | own
        seconds = [costs.total(true, costs.terms(backend, size)) for size in SIZES]
        found = costs.fit(backend, list(zip(SIZES, seconds, strict=True)))
        assert found == pytest.approx(true, rel=1e-3, abs=1e-18)


def test_only_sparse_products_pay_for_token_major_activations():
    for device, ours in (("cpu", "cpu"), ("cuda", "triton rows")):
        cost = {
            (backend, major): costs.predict(backend, device, torch.float32, costs.Size(512, 512, 512, 900, major), True)
            for backend in (ours, "reference") for major in (False, True)
        }  # fmt: skip
        assert cost[ours, True] > cost[ours, False]
        assert cost["reference", True] == cost["reference", False]


def test_fit_is_never_negative():
    rows = [(size, 1.0 / (1 + i)) for i, size in enumerate(SIZES)]  # larger work, less time
    assert min(costs.fit("cpu", rows).values()) >= 0
    with pytest.raises(ValueError, match="fitting the cost of 'cpu' needs at least one measurement, got none"):
        costs.fit("cpu", [])


@pytest.mark.parametrize("device, backends", [("cpu", ["cpu"]), ("cuda", ["triton rows", "triton slabs"])])
def test_the_shipped_model_predicts_for_every_backend_and_pass(device, backends):
    assert costs.origin(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for training in (False, True):
            for backend in (*backends, "reference"):
                if backend == "triton slabs" and dtype == torch.float32:
                    continue
                if backend == "reference" and device == "cpu" and dtype != torch.float32:
                    continue  # the benchmark may have given up on it
                few, many = (
                    costs.predict(backend, device, dtype, costs.Size(2048, 2048, 4096, nnz, False), training)
                    for nnz in (4000, 400000)
                )
                assert 0 < few <= many < 1000


def test_by_the_shipped_model_sparse_wins_where_almost_all_is_zero_and_loses_when_full():
    for device, ours in (("cpu", "cpu"), ("cuda", "triton rows")):
        thin, full = (costs.Size(2048, 2048, 4096, int(rho * 2048**2), False) for rho in (0.001, 1))
        for which in (False, True):
            cost = {
                (backend, size): costs.predict(backend, device, torch.float32, size, which)
                for backend in (ours, "reference") for size in (thin, full)
            }  # fmt: skip
            assert cost[ours, thin] < cost["reference", thin]
            assert cost[ours, full] > cost["reference", full]
