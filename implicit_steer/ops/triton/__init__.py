"""Triton kernels of the fused operator: the map of this folder.

A forward pass is a row of kernels, edges sorted by target:

===========  =========================================================================  ===========================
pack.py      parameters and statistics of batch norms → packed weights of the hidden     (n,)
             layers, and Θ
edges.py     edges → harmonics q, hidden coefficients r; of narrow layers in zonal       q (E, n_harmonics),
             frames. Others take frame.py and layers.py                                  r (E, n_columns)
spline.py    edges → q and r by the splines of a table in place of the hidden layers;    q, r
             and sums over the edges near each knot, for the gradients                   (n_rows, C)
frame.py     edges → inputs of the MLP, radius, factor γ s(|x|), harmonics q             (E, n_inputs), (E,), (E,), q
layers.py    all hidden layers of a block of edges in one kernel → hidden coefficients   r
             y, written as r = factor · (y, 1)
contract.py  T_i = Σ_{e: j→i} (C · q_e · f_j) ⊗ r_e per node, on chip; then              T (nodes, n_t),
             out_i = T_i Θ, one matrix product for a batch of nodes                      Θ (n_t, C_out)
===========  =========================================================================  ===========================

A call: ``backend.py`` → ``call.py`` (binds plan and parameters, measures batch statistics, records the call for
autograd) → ``operators.py`` (schemas, shapes, derivatives; a plan goes by its digest) → ``convolution.py`` (which
kernels, in which order) → ``launch_pack.py``, ``launch_edges.py``, ``launch_spline.py``, ``launch_mlp.py``,
``launch_contract.py`` (tensors in, tensors out) → ``launch.py`` → the kernels. ``dense.py`` has frame, layers and
splines in PyTorch, for the derivatives of gradients. The MLP at the knots of a table is ``kernel_mlp.py``'s.

From a plan to tables: ``tables.tables(plan)`` asks ``columns.py`` where r holds what the couplings read, and has the
tables made by ``mlp_tables.py`` and ``contract_tables.py`` (which has a worked example); ``packing.py`` makes the
sparse matrix that pack.py multiplies with. What becomes a constant of the kernels is in ``sizes.py``, so one binary
serves all plans of equal sizes (those of edges.py also have the table of harmonics as a constant); the rest is tensors,
which ``prepared.prepare`` puts on the device. ``configuration.py`` says how many edges a block has and how many warps
run it. ``aot.py`` compiles for GPUs that are not here. ``tables.py``, ``packing.py`` and what they import,
``configuration.py``, ``dense.py`` and ``backend.py`` are imported without triton.

To add a kernel: write it in the file of its step; give it a line in ``configuration._TABLE``, keyed by its name; launch
it through ``launch.launch`` from a function that names all tensors and constants; call that function from
``convolution.py``. ``aot.launches_of`` and the tests of compiled code then find it by themselves.

Glossary
--------

Arguments of kernels come in this order: tensors, integers, constants. Names have the prefixes of
flash-linear-attention:

=========  ======================================================================================================
``p_x``    pointer: a tensor passed to the kernel, or addresses computed from one
``b_x``    values of a block, in registers
``o_x``    offsets, integers along an axis: of edges, coefficients, samples, ...; −1 in a table: none
``m_x``    mask, where a block is inside of its tensor
``i_x``    one integer: the number of a program, a step of a loop, a place in a table
``n_x``    a count that is loaded or passed
``d_x``    after one of these: the gradient of the loss with respect to x
=========  ======================================================================================================

Constants are in capital letters. N… counts what there is, B… is the extent of the block that holds it: the next power
of two, at least 16 where the block is a factor of a product. *Padded* means filled up from N to B, with 0 or by a mask.

================  ===============================================================================================
BE                edges of a block
DIM, KIND         coordinates of x; kind of frame, as in ``sizes.FRAME_KINDS``
NA, BA            attributes of an edge
NI, BI            inputs of the first layer (in the backward kernels BI is of the layer at hand)
NM, BM; DEGREE    monomials of the spherical harmonics; their highest exponent, or the highest order of attributes
NQ, BQ            harmonics q of an edge, without the constant q₀ = 1
PAIRS             pairs of attributes that can stand for the azimuth
CUTOFF            whether there is one
NL                hidden layers
N0, B0; N1, B1    coefficients of a hidden layer of order 0; of orders >= 1; both times channels
NU, BU            samples u of an activation times channels, in whole tiles; samples of a tile
NR                columns of r
NT                entries of T per node
C_IN; C, BC       columns of x; of the rows that are summed by source; those that a program holds at a time
S, V, W           slots, fields and columns of an accumulator of T
D, D_ALL          components of an input field that are read at a time; of a field, in whole chunks
FN                the activation function's place in ``plan.FUNCTIONS``
NEAR              radius below which the difference quotient is used, in the unit of positions
SMALL             argument below which the quotient is a mean of slopes
SOFT, ZERO        ε² under the root of a radius; squared lengths that count as 0: both in the unit of positions squared
PREC              ``input_precision`` of tl.dot
REGULAR, FIRST    whether the frame is regular; whether the layer is the first
STORE_*, NEED_*   whether a result is wanted
NW, NC, NS        of edges.py: channels, coefficients of a channel, samples; NY: numbers in a row of its y
HARMONICS, POWERS of edges.py: tables of frame.py, as tuples
SCALED            of edges.py: whether r is wanted, not y; BITS: of the columns of a block that is stored
BOUNDED, EVEN     of spline.py: as in ``plan.Table``
NV, NK            of spline.py: columns of the values that knots sum, and how many of these are summed
BN, ROWS          of pack.py: products of a row and rows at a time; NORMS: whether there are batch norms; EPS: theirs
BACKWARD          of pack.py: whether the products have the gradient of a packed weight as a factor
ADD, HAS_ONE      whether to add to what is there; whether q₀ = 1, or 0
================  ===============================================================================================
"""
