"""Teams in words and figures: who has how much of a layer, and what sharing gains."""

from __future__ import annotations

from model import costs
from model.share import Share, share_spec
from model.spec import ModelSpec
from planning.plan import Plan

_A_LAYER = 1
"""The first layer. All layers of a model that teams share are alike."""


def layer_fraction(spec: ModelSpec, share: Share) -> float:
    """The part of a layer's weights that a member has, 0 to 1."""
    own = costs.block_flops(share_spec(spec, share), _A_LAYER, 0)
    return own / costs.block_flops(spec, _A_LAYER, 0)


def fractions(spec: ModelSpec, plan: Plan) -> dict[str, float]:
    """The part of a layer's weights of each member of a team, by device."""
    return {
        member.device: layer_fraction(spec, member.share)
        for stage in plan.stages
        for member in stage.members
    }
