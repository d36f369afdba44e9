"""Texts and conversations on which two implementations of one model are compared."""

from __future__ import annotations

PARAGRAPHS = (
    "The river rises in the hills behind the village and reaches the sea after two hundred kilometres. In 1847 its "
    "banks were raised by 3.5 metres, which cost 12,000 pounds and the patience of everyone who lived there.",
    "def mean(values):\n    # the empty list has no mean\n    if not values:\n        return None\n"
    "    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))\n",
    "Äpfel, Öl und Übermut: der Bäcker sagte, daß er's nicht glaube. « Où est la gare ? » — 我们明天去北京。"
    " Привет, мир! 😀👩‍👩‍👧 naïve café №5 ½ ٣٤٥",
    "Dear   Anna,\r\n\r\n\tthey'LL come at 07:30, we'Re told; I'd say it's late.\n\n\n  - 1st item\n  - 22nd item   \n"
    "Yours, B.\u00a0C. <|not special|> <p class='x'>&amp;</p>",
)

# Cut-up paragraphs reach token boundaries that whole ones do not.
PROBES = (
    *PARAGRAPHS,
    *(paragraph[start : start + 23] for paragraph in PARAGRAPHS for start in range(0, len(paragraph), 11)),
    "", " ", "\n", "   \n \t ", "ſ's 'ſ 'S", "a" * 40, "ab" * 30, "0123456789" * 3, "....----....",
)  # fmt: skip

CONVERSATIONS = (
    {
        "messages": [
            {"role": "user", "content": "What is 12 * 34?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see: "},
                    {"type": "python", "text": "12*34"},
                    {"type": "python_output", "text": "408"},
                    {"type": "text", "text": "It is 408."},
                ],
            },
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Is the sky blue?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And at night?\n"},
            {"role": "assistant", "content": ""},
        ]
    },
)
