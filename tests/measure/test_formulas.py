import torch

from lit_compress.measure.formulas import missing_formulas


def test_formulas_of_operators_that_need_a_gpu() -> None:
    formulas = missing_formulas()
    weights = [(20, 3), (20, 5), (20,), (20,)]  # one LSTM layer, hidden size 5
    lstm = formulas[torch.ops.aten._cudnn_rnn]((7, 2, 3), weights, 4)
    assert lstm == 2 * 7 * 2 * 4 * 5 * (3 + 5)
    attention = formulas[torch.ops.aten._scaled_dot_product_fused_attention_overrideable]
    assert attention((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4)) == 2 * 2 * 3 * 5 * 6 * (8 + 4)
    assert formulas[torch.ops.aten._int_mm]((3, 4), (4, 5)) == 2 * 3 * 4 * 5
