"""What quantizers have in common: names, packed integers, a layer that dequantizes, samples, and feedback.

Nothing here knows a format; those are the quantizers' own.
"""
