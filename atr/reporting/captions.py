"""Explanations in the report that are the same for all results."""

CURVES_NOTE = (
    "Score against the fraction of visual tokens that is kept. The bands around the thick lines are 95 % "
    "intervals. A star is a reducer that chooses the number of tokens itself, at the mean fraction it "
    "keeps. Every curve ends at the score with all tokens. For reducers inside the language model (fastv, "
    "pyramiddrop) the kept fraction is a mean over its layers, of which the first read all tokens."
)
SCORES_NOTE = (
    "Scores are in %; differences are in points, with paired 95 % intervals. The intervals of the scores "
    "are in the figures and in the summary.json of each reducer. Tokens are means per question, with the "
    "weights of the mean score. Fed tokens include the newline tokens at the ends of an image's rows, "
    "which do not count as kept. For reducers inside the language model both numbers are means over its "
    "layers."
)
DIFFERENCES_NOTE = (
    "Both reducers answered the same questions; the 95 % intervals are a paired bootstrap over questions "
    "within each benchmark. A win is an interval wholly above zero (▲), a loss is wholly below zero (▼), "
    "and anything else is a tie (=). The heat maps show points, with the strongest competitor at the top."
)
MATCHES_NOTE = (
    "A reducer that chooses the number of tokens for each image, against the same reducer with a fixed "
    "kept fraction. Both are compared at the same mean number of tokens per question: the fixed score is "
    "interpolated between the two nearest kept fractions."
)
INTRINSIC_NOTE = (
    "The quality of the kept tokens, measured without a language model: the variance of the features that "
    "a reconstructor cannot restore from them (the reconstructor trained with the selector, and one "
    "trained on random masks), the fraction of the written characters they cover, and how much two "
    "reducers' kept tokens overlap (IoU, in %)."
)
OVERLAP_CAPTION = "Overlap (IoU, in %) of the tokens that two reducers keep, at kept fraction {keep:g}."
LATENCY_NOTE = (
    "Medians. Selection is the time to choose the tokens, including the attention that a method needs. "
    "Prefill saved is the prefill time with all tokens minus that with the kept ones. Net gain is prefill "
    "saved minus selection."
)
ROBUSTNESS_NOTE = (
    "Each reducer is compared with itself in deployments that differ in one respect from the reference: "
    "the model's own processor (Pillow), its vision tower in float32 with sdpa attention, and original "
    "positions. Overlap is the IoU of the kept tokens: the mean over images, and the lowest in brackets. "
    "Changes are in points of the mean score over the benchmarks, with paired 95 % intervals over "
    "questions. A change that also occurs with all tokens is not due to the selection."
)
ROBUSTNESS_CAPTION = (
    "Left: overlap with the tokens kept in the reference. Right: change of the score in points, with "
    "paired 95 % intervals. Hollow marks are the overlap on photographs, where the variant leaves every "
    "pixel of the questions' images unchanged."
)
EXAMPLES_NOTE = (
    "Answers with all tokens, and with {half} of them kept by random selection (first seed) and by the "
    "selector. Shown are the first questions of each benchmark in turn that are answered correctly with all "
    "tokens and by exactly one of the two. Questions that random selection wins are included if there are "
    "any."
)
NO_RANDOM = "Examples compare the selector with random selection, which was not evaluated."
NO_EXAMPLES = (
    "No question is answered correctly with all tokens and by exactly one of selector and random selection."
)
COMPONENTS_CAPTION = (
    "Two photographs, and the first three principal components of their patch features from encoder "
    "{encoder}, as red, green and blue."
)
PAGES_CAPTION = (
    "Held-out images of {benchmark}, and the patches kept by {reducers}. Dropped patches are grey."
)
