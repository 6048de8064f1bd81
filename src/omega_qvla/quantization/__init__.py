"""Pure quantization maths on tensors: no files, no models, no devices of its own.

* ``rotations``   – what mixes the channels of one block: Hadamard, singular vectors, greedy, WUSH;
* ``transforms``  – smoothing, composite rotation and permutation of a site's input space;
* ``weights``     – integer weights: scales, round to nearest, GPTQ;
* ``low_rank``    – a 16-bit branch beside the integers;
* ``activations`` – integer activations: per-token, per-step and per-channel scales;

Everything here is deterministic: the same inputs give the same bytes.
"""
