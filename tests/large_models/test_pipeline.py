import itertools

import pytest

from zhizhi.large_models.pipeline import bubble, bubble_formulas, one_f_one_b


@pytest.mark.parametrize(("P", "M"), [(1, 3), (2, 2), (4, 9), (8, 20)])
@pytest.mark.parametrize(("F", "B"), [(1.0, 2.0), (1.0, 1.0), (2.0, 3.0)])
def test_each_stage_is_idle_for_p_minus_one_rounds(P, M, F, B):
    work = one_f_one_b(P, M, F=F, B=B)
    for stage in range(P):
        assert bubble(work, stage=stage) == pytest.approx((P - 1) * (F + B))


def test_nothing_begins_before_what_it_needs_and_no_stage_does_two_things():
    work = one_f_one_b(4, 7)
    end = {(w.stage, w.kind, w.batch): w.end for w in work}
    assert len(end) == len(work) == 2 * 4 * 7
    for w in work:
        if w.kind == "F" and w.stage > 0:
            assert w.start >= end[w.stage - 1, "F", w.batch]
        if w.kind == "B":
            assert w.start >= end[w.stage, "F", w.batch]
            if w.stage < 3:
                assert w.start >= end[w.stage + 1, "B", w.batch]
    for stage in range(4):
        mine = sorted((w.start, w.end) for w in work if w.stage == stage)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine))


def test_a_stage_keeps_at_most_as_many_batches_as_stages_follow():
    for stage in range(4):
        under_way = most = 0
        for w in sorted(one_f_one_b(4, 9), key=lambda w: w.start):
            if w.stage == stage:
                under_way += 1 if w.kind == "F" else -1
                most = max(most, under_way)
        assert most == 4 - stage


def test_the_formulas():
    assert bubble_formulas(8) == {"1F1B": 21.0, "ZB1P": 7.0, "DualPipe": 6.0}
    assert bubble_formulas(8, both=2.5)["DualPipe"] == 4.5
    assert bubble_formulas(8)["1F1B"] == bubble(one_f_one_b(8, 20))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="2 micro-batches on 3 stages"):
        one_f_one_b(3, 2)
    with pytest.raises(ValueError, match="n_stages is 7"):
        bubble_formulas(7)
