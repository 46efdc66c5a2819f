"""Text that has a form: JSON of a schema, a pattern, one of some choices, at any temperature.

Needs the extra `grammar`: pip install '.[grammar]'.
"""

import json

from nanovllm import LLM, SamplingParams, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "languages": {"type": "array", "items": {"enum": ["en", "de", "zh"]}, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
FORMS = [
    StructuredOutput(json=PERSON),
    StructuredOutput(regex=r"\d{4}-\d{2}-\d{2}"),
    StructuredOutput(choice=["yes", "no", "it depends"]),
    StructuredOutput(grammar='start: NUMBER (" + " NUMBER)*\nNUMBER: /[1-9][0-9]?/'),
]


def main(model: str = "demo") -> None:
    with LLM(model) as llm:
        for form in FORMS:
            params = SamplingParams(max_tokens=150, seed=1, structured_output=form)
            output = llm.generate("Tell me about Ada: ", params, use_tqdm=False)
            print(f"{form.kind:<8}{output.text!r} [{output.finish_reason}]")
            if form.json is not None:
                print(f"        {json.loads(output.text)['age']} years old")


if __name__ == "__main__":
    main()
