# SPDX-License-Identifier: Apache-2.0
"""Whether FUSEDMLA, its fp8 cache or sparse attention change a model's answers: `fusedmla eval`.

A comparison has configurations (attention backend, KV cache dtype), each an engine in processes of its own that runs
lm-eval's tasks and, teacher-forced, decodes given texts token by token. What they say is compared pairwise, prompt by
prompt and token by token. Needs the extra `eval`; importing this package needs the standard library only.
"""
