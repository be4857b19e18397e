"""Evaluation: how much of the teacher's quality a ternary model keeps, measured by MTEB's own task classes.

- `tasks`: what is measured, from folders on disk or by MTEB task name
- `files`: strict reading of jsonl and tsv
- `encoder`: the model as mteb sees it; encodes each distinct text once
- `fidelity`: agreement with the teacher on texts without labels
- `report`: runs the tasks, compares with the baseline, prints the table

`files` is free of heavy imports; `fidelity` needs what sentence-transformers brings, the others
`pip install "hf_ternary[eval]"`.
"""
