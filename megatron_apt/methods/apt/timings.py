"""Timings of the branches in the interleaved schedules that long searches have found.
They carry over to other sizes.

The first: 8 ranks in a V, 16 microbatches, F = I = W, at most 16 live activations. It
reaches the lower bound there, and on 4 ranks.
The second: the same for F 1, I 1.8, W 0.3 (a video's attention). Bubble 0.02 once it is
justified.
"""

G_FAKE = ((0.332, -0.171, 0.273, -0.722, 6.955), (0.001, 0.211, 1.046, 1.409, -0.939))
D_REAL = ((0.366, 0.417, 1.298, 2.859, 6.717), (0.243, 0.249, 1.164, 1.194, -0.899))
D_FAKE = ((0.997, -0.094, 0.242, 0.757, 0.907), (0.465, 0.191, 0.939, 2.151, 1.175))
