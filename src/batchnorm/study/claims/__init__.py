"""The claims, in the order of the report: a new one is a new module and a line here."""

from batchnorm.study.claims import agreement, epoch_time, fewer_steps, learning_rates
from batchnorm.study.claims.claim import Claim as Claim
from batchnorm.study.claims.claim import Finding as Finding
from batchnorm.study.claims.claim import Judgement as Judgement
from batchnorm.study.plan import Plan
from batchnorm.study.store import Store

CLAIMS = (fewer_steps.CLAIM, epoch_time.CLAIM, learning_rates.CLAIM, agreement.CLAIM)


def judge(plan: Plan, store: Store) -> list[Judgement]:
    """Judge all claims by the outcomes that they asked for."""
    return [
        Judgement(claim, claim.measure(plan, store), claim.charts(plan, store)) for claim in CLAIMS
    ]
