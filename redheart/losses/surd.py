"""Loss of the SURD head.

The constraint that redundant + unique + synergistic = 1 holds by construction (the head's softmax), so no penalty term
is needed for it; the leak is a fourth, separate probability.
"""

from redheart.losses.elementwise import squared

__all__ = ["squared"]
