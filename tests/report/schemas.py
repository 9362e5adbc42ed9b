"""JSON schemas of what ``--format json`` prints: schema version 1, as users rely on it."""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
NUMBER = {"type": ["number", "null"]}
FRACTION = {"type": ["number", "null"], "minimum": -1.000001, "maximum": 1.000001}
POSITIVE = {"type": ["number", "null"], "minimum": 0}
SIZES = {"type": "array", "items": {"type": ["integer", "null"], "minimum": 0}}


def record(**properties: Any) -> dict[str, Any]:
    """An object with these entries and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def every(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def optional(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


SITE = optional(
    record(
        file=STRING,
        line={"type": ["integer", "null"], "minimum": 1},
        column={"type": ["integer", "null"], "minimum": 1},
        node={"type": ["string", "null"]},
    )
)
VALUES = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}
TRAINING = record(
    draws=COUNT,
    started=COUNT,
    failed=COUNT,
    undecided=COUNT,
    steps={"type": ["integer", "null"]},
    most=COUNT,
    task=STRING,
    optimizer={"enum": ["sgd", "adam"]},
    rates=every({"type": "number"}),
)
FINDING = record(
    code={"type": "string", "pattern": r"^[A-Z]+\d+$"},
    slug={"type": "string", "pattern": r"^[a-z0-9-]+$"},
    severity={"enum": ["error", "warning", "info"]},
    message=STRING,
    module=STRING,
    modules=every(STRING),
    count={"type": "integer", "minimum": 1},
    site=SITE,
    evidence=VALUES,
    suggestion=optional(record(text=STRING, code={"type": ["string", "null"]}, values=VALUES)),
    verdict={"enum": [None, "confirmed", "refuted", "inconclusive"]},
    measurement=optional(
        record(
            statistic={"type": ["string", "null"]},
            predicted=NUMBER,
            limit=NUMBER,
            figure=NUMBER,
            low=NUMBER,
            high=NUMBER,
            draws=COUNT,
            lost=COUNT,
            needed={"type": ["integer", "null"]},
            remark=STRING,
        )
    ),
    trial=optional(
        record(found=optional(TRAINING), remedied=optional(TRAINING), remark=STRING,
               remedy={"type": ["string", "null"]}, decides={"type": "boolean"})
    ),
)  # fmt: skip
TARGET: dict[str, Any] = {
    "target": STRING,
    "input": {"type": "object", "additionalProperties": STRING},
    "mode": {"enum": ["train", "eval"]},
    "coverage": record(
        nodes=COUNT, modelled=COUNT, unmodelled={"type": "object", "additionalProperties": COUNT}
    ),
    "weights": {"enum": ["initial", "trained", "mixed"]},
    "weights_evidence": STRING,
    "notes": every(STRING),
}
FAILED = record(
    target=STRING,
    error=record(message=STRING, hint={"type": ["string", "null"]}, details=STRING),
    findings={"type": "array", "maxItems": 0},
)
CHECK = record(
    schema_version={"const": 1},
    archlint=STRING,
    targets=every(
        {"anyOf": [record(**TARGET, findings=every(FINDING), training=optional(TRAINING)), FAILED]}
    ),
    summary=record(
        targets=COUNT, failed=COUNT, findings=COUNT, error=COUNT, warning=COUNT, info=COUNT
    ),
)
PARAMETER = record(
    name=STRING,
    shape=SIZES,
    family={"type": ["string", "null"]},
    mean=NUMBER,
    second_moment=POSITIVE,
    kurtosis=NUMBER,
    exact={"type": "boolean"},
    site=SITE,
)
VALUE = record(
    id=STRING,
    op=STRING,
    module=STRING,
    module_type=STRING,
    shape=optional(SIZES),
    rms=POSITIVE,
    mean=NUMBER,
    spread=POSITIVE,
    position_correlation=FRACTION,
    sample_correlation=FRACTION,
    grad_rms=POSITIVE,
    site=SITE,
)
PROFILE = record(
    schema_version={"const": 1},
    archlint=STRING,
    targets=every(record(**TARGET, parameters=every(PARAMETER), values=every(VALUE))),
    summary=record(targets=COUNT, failed=COUNT, parameters=COUNT, values=COUNT, unknown=COUNT),
)
