import math

import pytest
import torch
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.evaluate import windows


def test_perplexity_is_the_model_own_loss() -> None:
    model, ids = MODELS["llama"](), token_ids()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert ptq.mean_loss(model, ids) == pytest.approx(loss, rel=1e-5)
    assert ptq.perplexity(model, ids) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_loss_beyond_what_exp_can_hold_is_an_infinite_perplexity() -> None:
    model = MODELS["llama"]()
    model.model.norm.weight.data *= 1e6
    assert 709 < ptq.mean_loss(model, token_ids()) < math.inf
    assert ptq.perplexity(model, token_ids()) == math.inf
    model.model.norm.weight.data[0] = math.nan
    assert math.isnan(ptq.perplexity(model, token_ids()))


def test_windows_of_one_token_predict_nothing() -> None:
    with pytest.raises(ValueError, match=r"samples must be of at least 2 tokens, got shape \(10, 1\)"):
        ptq.perplexity(MODELS["llama"](), token_ids()[:, :1])


def test_windows_follow_each_other() -> None:
    assert windows(torch.arange(10), 3, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="4 samples of 3 tokens take 12, the text has 10"):
        windows(torch.arange(10), 3, 4)
    with pytest.raises(ValueError, match="length must be at least 2 and samples at least 1, got 1 and 4"):
        windows(torch.arange(10), 1, 4)
