"""The bodies of our own interface, as values: what is sent, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ...messages import one_line
from ...spellings import nearest
from ..limits import MOST_LORAS, MOST_TEXT
from .schema import any_request

Name = Annotated[str, Field(min_length=1, max_length=500)]


class Body(BaseModel):
    """What is sent: nothing in it is converted, and nothing that is unknown is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Raise ValueError for an unknown name, with the nearest one that is known."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                near = nearest(name, cls.model_fields.keys())
                hint = f"did you mean {near!r}?" if near else f"there are {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown field {one_line(name, 60)!r}: {hint}")
        return values


class Lora(Body):
    """A LoRA by its name, and its weight."""

    name: Name
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class GenerateBody(Body):
    """A request, and what it is generated with."""

    request: Annotated[dict[str, Any], WithJsonSchema(any_request())] = Field(description="GET /api/schema")
    model: Name | None = Field(None, description="name, title or hash; null: the current model")
    loras: list[Lora] = Field(default=[], max_length=MOST_LORAS)
    vae: Name | None = Field(None, description="name of a VAE in place of the model's own")
    previews: int = Field(0, ge=0, le=1000, description="a preview at every k-th step; 0: none")


class TextBody(Body):
    """A prompt whose tokens are counted."""

    text: str = Field(max_length=MOST_TEXT)
    web_ui_prompts: bool = False


class NameBody(Body):
    """The name of a model."""

    name: Name


class Generated(BaseModel):
    """The result of a request. `parameters` of each PNG has its text as well."""

    id: str
    images: list[str] = Field(description="PNG, as base64")
    seeds: list[int]
    variation_seeds: list[int]
    texts: list[str]
    notes: list[str] = Field(description="what was cut, chosen or retried")
    model: str
    seconds: float
    interrupted: bool = Field(description="finished early, see POST /api/jobs/{id}/interrupt")


class JobState(BaseModel):
    """How far a job is."""

    id: str
    state: str
    step: int
    steps: int
    position: int | None = Field(description="jobs before it in the queue; null once it runs")


class Tokens(BaseModel):
    """The tokens of a prompt."""

    count: int
    limit: int = Field(description="tokens that fit: of the prompt, or with web_ui_prompts of each chunk")
    chunks: int
    cut: str = Field(description="the end of the prompt that does not fit")
    unknown: list[str] = Field(description="words that the model has no vectors for")


class Recipe(BaseModel):
    """How an image was made."""

    request: dict[str, Any] = Field(description="as for POST /api/generate, without images")
    loras: list[dict[str, Any]]
    model: str
    model_known: bool
    program: str
    notes: list[str]
    text: str


class Problem(BaseModel):
    """An error: what is wrong and what to do, in one line."""

    status: int
    message: str
