"""Examples of what the parsers read, and pieces of it that mean something to them."""

from __future__ import annotations

import yaml

# Manifests.

ROWS = [
    {"id": "1", "patient": "A", "task": "choice", "prompt": "q", "options": ["a", "b"], "answer": "a",
     "images": "0.png", "split": "train", "mpp": 0.5},
    {"id": 2, "patient": 3.0, "task": "detection", "prompt": "q", "answer": [[1, 2, 30, 40.5]], "images": ["1.png"],
     "split": "val", "question": "boxes", "box": None},
    {"id": "3", "patient": "C", "task": "synoptic", "prompt": "q", "protocol": "breast_resection",
     "answer": {"grade": "II"}, "slides": ["s.svs", "../x.svs"], "split": "test", "extra": {"a": [1, {"b": None}]}},
]  # fmt: skip
SWIFT = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>Which?"},
                 {"role": "assistant", "content": "<think>t</think><answer>(A) a</answer>"}],
    "images": [{"path": "0.png"}], "patient": "P", "solution": "<answer>a</answer>",
}  # fmt: skip
JSON_WORDS = [
    b"null", b"NaN", b"Infinity", b"-1e999", b"1" * 5000, b"[" * 3000, b"{\"a\":" * 2000, b"\\ud800", b"\\u0000",
    b"\xef\xbb\xbf", b"\xff", b"true", b"{}", b"[]", b'""', b'"id"', b'"task"', b'"choice"', b'"open"', b'"detection"',
    b'"synoptic"', b'"images"', b'"slides"', b'"options"', b'"answer"', b'"messages"', b'"protocol"', b'"split"',
    b'"mpp"', b'"patient"', b'"/etc/passwd"', b'"../../x"', b'"0.png"', b'"m.png"', b'"s.svs"', b'"x.yaml"', b"1e400",
    b'"' + b"a" * 5000 + b'"', b"\n", b",", b":", b"0x1", b"-0", b"1.0", b'"group"', b'"label"', b'"file"',
]  # fmt: skip
CSV_WORDS = [
    b",", b"\n", b"\r", b'"', b'""', b"file", b"label", b"split", b"patient", b"mask", b"mpp", b"0.png", b"m.png",
    b"\t", b"[1", b'"[""a""]"', b"prompt", b"answer", b"task", b"images", b"\0", b"\xff", b"\xef\xbb\xbf", b"nan",
    b"inf", b"x" * 140_000, b"../0.png", b"/etc/passwd", b"options", b"id",
]  # fmt: skip
CSV = b"file,label,patient,split,mpp,mask\n0.png,a,P,train,0.5,m.png\n1.png,b,Q,test,,m.png\n"
CASES_CSV = (
    b"id,patient,task,prompt,answer,images,options,split\n"
    b'1,A,choice,q,a,0.png,"[""a"", ""b""]",train\n2,B,open,q,"a, b",1.png,,val\n'
)

# YAML.

YAML_WORDS = [
    b": ", b"- ", b"\n", b"  ", b"&a ", b"*a", b"<<: ", b"!!int ", b"!!python/object:os.system ", b"!!binary ", b"{}",
    b"[]", b"null", b"~", b"true", b"1e-3", b".nan", b".inf", b"0x" + b"f" * 5000, b"2001-99-99", b"1" * 5000,
    b"[" * 2000, b"? ", b"|\n", b">\n", b"'", b'"', b"%YAML 9.9\n", b"---\n", b"...\n", b"\xff", b"\0", b"=",
    b"extends: ", b"type: ", b"fields", b"values", b"ordinal", b"list", b"multi", b"number", b"applies_if", b"derive",
    b"groups", b"tolerance", b"cases", b"ladder", b"allocator", b"encoder", b"performer", b"rewards", b"sft",
    b"evaluation", b"!!set ", b"!!omap ",
]  # fmt: skip
PROTOCOL = yaml.safe_dump(
    {
        "title": "t", "version": "1", "source": "s",
        "fields": [
            {"id": "grade", "name": "Grade", "type": "ordinal", "values": {"I": ["one"], "II": None}, "class": "core"},
            {"id": "size", "name": "Size", "type": "number", "unit": "mm", "tolerance": {"absolute": 1}},
            {"id": "margin", "type": "multi", "values": ["x", "y"], "class": "conditional",
             "applies_if": {"grade": {"not": ["I"]}}, "groups": {"g": ["x"]}},
            {"id": "total", "type": "integer",
             "derive": [{"sum": ["size", "size"]}, {"value": 3, "if": {"size": "> 0"}}]},
            {"id": "nodes", "type": "list", "fields": [{"id": "site", "type": "text"}], "key": ["site"]},
        ],
    }
).encode()  # fmt: skip

# Completions and reports.

COMPLETIONS = [
    b"<think>Glands are round.</think><answer>benign</answer>",
    b"<answer>(B) Malignant</answer>",
    b"</think> <answer>[[1, 2, 3, 4], [5.5, 6, 7e1, 8]]</answer>",
    b"[[0, 0, 100, 100]]",
    b"[]",
    "a. ﬁbroma – ‘benign’|b) HER2+".encode(),
]
COMPLETION_WORDS = [
    b"<think>", b"</think>", b"<answer>", b"</answer>", b"[", b"]", b"[[", b",", b"1e999", b"-0", b"1" * 5000, b"(A)",
    b"b)", b"|", "ﷺ".encode() * 300, "İ".encode(), b"\xed\xa0\x80", b"\0", b" " * 9000, b"benign", b"[" * 5000,
    b"\xe2\x80\xa8",
]  # fmt: skip
REPORTS = [
    b"Histologic type: invasive carcinoma of no special type\nNottingham grade: 2\nTumor size: 21 mm\nER: 90%",
    b'{"histologic_type": "invasive lobular carcinoma", "tumour_size_mm": "2.1 cm", "margins": ["a", {"b": 1}]}',
    b'```json\n{"grade": 2}\n```',
    b"Breast, right, core biopsy:\n1. Invasive carcinoma, grade II\n2. Ductal carcinoma in situ\n   - comedo type",
    b"Prostate, biopsy;\nAcinar adenocarcinoma, Gleason's score 7 (4+3), grade group 3, tumor volume: 60%",
    b"Colon, ascending, resection: adenocarcinoma. Note) There is no lymphovascular invasion.",
]
REPORT_WORDS = [
    b":", b";", b"\n", b"- ", b"1. ", b"(", b")", b'"', b"not identified", b"not applicable", b"cannot be determined",
    b"< 5 mm", b"2 x 3 x 1 cm", b"1,200", b"%", b"Grade", b"Tumor size", b"Lymph nodes", b"{", b"}", b'{"a":' * 3000,
    b"NaN", b"1" * 5000, "µm".encode(), "①½²".encode(), "٣".encode(), b"present", b"and", b"no evidence of",
    b"negative for", b"margins", b"pT2",
]  # fmt: skip
