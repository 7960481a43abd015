"""Learn the relation metric that ships with Everedit from ``relations.jsonl``: ``python tools/learn_relations.py``."""

from __future__ import annotations

from everedit.engine.relation import SHIPPED, RelationMetric, built_in_relations
from everedit.methods.marginalia import MarginaliaConfig
from everedit.models.sentences import SentenceEncoder


def main() -> None:
    """Write ``relations.safetensors`` beside the relations."""
    config = MarginaliaConfig()
    own = built_in_relations()
    metric = RelationMetric.of_texts(own, [], SentenceEncoder(config.encoder).embed, allowed=config.allowed)
    metric.keep(SHIPPED, RelationMetric.provenance(own, [], encoder=config.encoder, allowed=config.allowed))
    print(f"{SHIPPED}: {tuple(metric.weight.shape)}, limit {metric.limit:.4f}")


if __name__ == "__main__":
    main()
