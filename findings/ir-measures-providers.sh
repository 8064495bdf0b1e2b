#!/usr/bin/env bash
# ir-measures 0.4.3: some measures are wrong, or an exception, on ordinary input.
#
# - ERR@k and nDCG(dcg='exp-log2')@k go through TREC's gdeval.pl, which keeps of a query's id what follows the last
#   hyphen: of the queries a-7 and b-7 it makes one, whose value comes back for a query 7 that nobody asked for, and
#   both count 0.
# - Judged@k divides by zero where a query's list is empty.
# - Accuracy divides by zero where a list has relevant documents alone: a perfect list.
# - nDCG@k, by pytrec_eval, takes gains={1: 0.5} and then raises a TypeError.
# Needs perl. Exit status 0: it is so. 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "ir-measures==0.4.3"
"$folder/env/bin/python" - <<'PYTHON'
import ir_measures
from ir_measures.providers.accuracy_provider import AccuracyProvider
from ir_measures.providers.gdeval_provider import GdevalProvider
from ir_measures.providers.judged_provider import JudgedProvider

qrels = {"a-7": {"d1": 1}, "b-7": {"d1": 1}}
run = {"a-7": {"d1": 2.0, "d2": 1.0}, "b-7": {"d3": 2.0, "d1": 1.0}}
found = [(each.query_id, round(each.value, 3)) for each in GdevalProvider().iter_calc([ir_measures.ERR @ 2], qrels, run)]
print("ERR@2 of the queries a-7 and b-7:", found)
assert dict(found).keys() == {"7", "a-7", "b-7"} and dict(found)["a-7"] == dict(found)["b-7"] == 0, "this has changed"


def raised(work):
    try:
        list(work())
    except (ZeroDivisionError, TypeError) as error:
        return type(error).__name__
    return None


judged = raised(lambda: JudgedProvider().iter_calc([ir_measures.Judged @ 2], {"q": {"d": 1}}, {"q": {}}))
perfect = raised(lambda: AccuracyProvider().iter_calc([ir_measures.Accuracy()], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
measure = ir_measures.parse_measure("nDCG(gains={1:0.5})@10")
gains = raised(lambda: ir_measures.iter_calc([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
print("Judged of an empty list:", judged)
print("Accuracy of a perfect list:", perfect)
print("fractional gains:", gains)
assert (judged, perfect, gains) == ("ZeroDivisionError", "ZeroDivisionError", "TypeError"), "this has changed"
PYTHON
