"""What a peer may differ from a golden step by. Standard library only: the script of the comparison reads it too."""

# Largest relative error of a group, by precision; the README has the same table. In single precision and below a ReLU's
# operand may be rounded over zero, and from there on another function is computed: the error in double precision says
# that the program is right, the others that nothing is wrong with the precision. In f32 peers come to 1.2e-4, and a step
# with a few ReLUs on the other side to 4.5e-3; the smallest planted fault, the sign of η in a joint update, is off by 4.7e-2.
BOUNDS = {"f64": 1e-10, "f32": 1e-2, "tf32": 0.3, "f16": 0.3, "bf16": 0.5}
