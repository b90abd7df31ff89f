# SPDX-License-Identifier: Apache-2.0
"""Which vectors a ReMamba keeps, and what that is worth: arXiv 2408.15496, Fig. 3 and Table 5, in small."""
