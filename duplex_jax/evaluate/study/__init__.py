"""The user study of the paper's section 4.5: two anonymous models, a questionnaire, and its evaluation."""
