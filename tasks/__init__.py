"""What is asked and how it is judged.

data            files, which rows are taken      verdicts        the contract of all judges
problems        sums and GSM8K, prompts          answers         comparing values and output
sums, render    stories; solutions as programs   translate       OORL, with translate_data
multipl_e       HumanEval and MBPP               statistics      pass@k, intervals, comparison
evalplus        the same with more tests         requests        how benchmarks ask, by mode
fences          blocks of an answer              whole_programs  an answer as a program with tests
contamination   what must not be trained on      ir_groups       GEPO, with c_functions,
                                                                 ir_mutations, ir_marks and
                                                                 ir_exclusions
"""
