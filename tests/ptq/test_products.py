from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq.model import products
from opt8bit.ptq.model.blocks import evaluating
from opt8bit.ptq.model.products import Products

ONEDNN = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that oneDNN was given, of products that need not be as large as they are elsewhere."""
    shapes: list[tuple[int, ...]] = []
    product = products._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_product", counted)
    monkeypatch.setattr(products, "LEAST", 2**16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_is_intels", lambda: False)
    return shapes


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@ONEDNN
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (draw(70, 40), draw(50, 40), None),
        (draw(70, 40), draw(50, 40), draw(50)),
        (draw(3, 30, 40), draw(50, 40), draw(50)),
        (draw(40, 70).T, draw(50, 40), None),
        (draw(40, 70).T, draw(40, 50).T, None),
        (draw(1, 40), draw(4000, 40), None),
    ],
    ids=["plain", "bias", "3-D", "transposed", "both transposed", "one row"],
)
def test_products_of_onednn_are_those_of_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None, served: list[tuple[int, ...]]
) -> None:
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad(), Products():
        result = linear(x, weight, bias)
    assert served == [tuple(x.shape)]
    assert result.dtype == torch.float32 and result.shape == exact.shape and result.is_contiguous()
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@ONEDNN
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (draw(70, 80)[:, :40], draw(50, 40), None),  # oneDNN's own code for these is hundreds of times slower
        (draw(70, 40), draw(50, 80)[:, 40:], None),
        (draw(40, 90).T[:70], draw(50, 40), None),
        (draw(3, 40, 30).transpose(1, 2), draw(50, 40), None),
        (draw(70, 40).double(), draw(50, 40).double(), None),
        (draw(70, 40).bfloat16(), draw(50, 40).bfloat16(), None),
        (draw(70, 40), draw(50, 40), draw(100)[::2]),
        (draw(7, 4), draw(5, 4), None),
        (draw(0, 40), draw(50, 40), None),
        (draw(70, 0), draw(50, 0), None),
        (draw(7000, 40), draw(40), None),
        (draw(70, 40), draw(50, 40), torch.tensor(1.0)),
        (draw(70, 40), draw(50, 40), draw(1)),
    ],
    ids=[
        "part",
        "part of the weight",
        "rows of a transpose",
        "3-D transposed",
        "float64",
        "bfloat16",
        "strided bias",
        "small",
        "no rows",
        "no columns",
        "vector",
        "number for a bias",
        "one bias",
    ],
)
def test_others_are_left_to_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, served: list[tuple[int, ...]]
) -> None:
    with torch.no_grad(), Products():
        result = linear(x, weight, bias)
    assert not served and torch.equal(result, linear(x, weight, bias))


@pytest.mark.usefixtures("served")
def test_shapes_that_do_not_fit_are_refused_in_torchs_words() -> None:
    with torch.no_grad(), Products(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(draw(70, 40), draw(50, 41))


def test_autocast_keeps_its_dtype(served: list[tuple[int, ...]]) -> None:
    with torch.no_grad(), Products(), torch.autocast("cpu", torch.bfloat16):
        assert linear(draw(70, 40), draw(50, 40)).dtype == torch.bfloat16
    assert not served


def test_gradients_are_torchs(served: list[tuple[int, ...]]) -> None:
    x, layer = draw(70, 40).requires_grad_(), torch.nn.Linear(40, 50)
    with Products():
        layer(x).sum().backward()
    assert not served
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(70, 40))


@ONEDNN
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch's own flags
def test_modules_and_evaluation_go_there_and_may_be_kept_from_it(served: list[tuple[int, ...]]) -> None:
    x, layer = draw(70, 40), torch.nn.Linear(40, 50)
    with evaluating(layer):
        result = layer(x)
        assert served == [(70, 40)]
        with torch.backends.mkldnn.flags(enabled=False):
            plain = layer(x)
        linear(input=x, weight=layer.weight)
    assert served == [(70, 40)]
    assert torch.equal(plain, layer(x))
    torch.testing.assert_close(result, plain)


@pytest.mark.parametrize(("capability", "is_intels"), [("AVX2", False), ("AVX2", True), ("AVX512", True)])
def test_elsewhere_all_products_stay_with_mkl(
    capability: str, is_intels: bool, served: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_is_intels", lambda: is_intels)
    with torch.no_grad(), Products():
        linear(draw(70, 40), draw(50, 40))
    assert served == []


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_the_processors_maker_is_known(maker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    for path, elsewhere in ((about, ""), (tmp_path / "none", f"Model 85 Stepping 7, {maker}")):
        monkeypatch.setattr(products, "CPUINFO", path)
        monkeypatch.setattr(products.platform, "processor", lambda name=elsewhere: name)
        assert products._is_intels.__wrapped__() == (maker == "GenuineIntel")
