"""Terms of fine-tuning and of the libraries it stands on, a sentence each."""

import re
from typing import NamedTuple


class Term(NamedTuple):
    """A term as it stands in a sentence, what it means, and what its letters stand for if it is an abbreviation."""

    phrase: str
    meaning: str
    stands_for: str = ""

    @property
    def name(self) -> str:
        """The term without its article."""
        return re.sub(r"^(an?|the) ", "", self.phrase)


_LEARNING = (
    Term("fine-tuning", "Further training of a pretrained model on a smaller set of examples."),
    Term("pretraining", "The first training of a model, on much unlabelled text."),
    Term("continued pretraining", "More next-token training of a pretrained model on plain text of a new domain."),
    Term("SFT", "Training on prompts with reference answers.", "supervised fine-tuning"),
    Term("instruction tuning", "Fine-tuning on instructions and the answers to them."),
    Term(
        "RLHF",
        "Tuning a model with rewards learned from people's choices.",
        "reinforcement learning from human feedback",
    ),
    Term(
        "DPO",
        "Training directly on chosen and rejected answers, with no reward model.",
        "direct preference optimization",
    ),
    Term("KTO", "Preference training on single answers marked good or bad.", "Kahneman-Tversky optimization"),
    Term("a reward model", "A model that scores an answer as people would."),
    Term("a preference pair", "Two answers to one prompt, the better one marked."),
    Term("a reference model", "The frozen model that preference training must not stray far from."),
    Term("distillation", "Training a small model to copy the outputs of a larger one."),
    Term("catastrophic forgetting", "The loss of earlier skills while a model learns new data."),
    Term("overfitting", "Learning the training rows by heart while getting worse on new ones."),
    Term("underfitting", "Learning too little even of the training rows."),
    Term("regularization", "Any measure that keeps a model from overfitting."),
    Term("dropout", "Setting a random share of activations to zero while training."),
    Term("early stopping", "Ending training when the evaluation loss no longer falls."),
    Term("data leakage", "Evaluation rows that also stand in the training data."),
    Term("a curriculum", "A planned order of training rows, such as easy ones first."),
    Term("a hyperparameter", "A value chosen before training, such as the learning rate."),
    Term("an ablation", "A run that leaves one thing out to see what it is worth."),
    Term("a baseline", "The result that a new method is compared with."),
)

_STEPS = (
    Term("a gradient", "The slope of the loss with respect to each weight."),
    Term("backpropagation", "The computation of gradients from the loss back through the layers."),
    Term("a forward pass", "The computation of a model's outputs from its inputs."),
    Term("the loss", "The number that training makes small."),
    Term("cross-entropy", "The mean negative log-probability of the correct tokens."),
    Term("perplexity", "The exponential of the mean cross-entropy per token."),
    Term("an optimizer", "The rule that turns gradients into changes of the weights."),
    Term("SGD", "Steps against the gradient of a random batch.", "stochastic gradient descent"),
    Term("Adam", "An optimizer that scales each step by running means of the gradient and its square."),
    Term("AdamW", "Adam with weight decay kept apart from the gradient."),
    Term("Adafactor", "An optimizer that saves memory by storing row and column means of squared gradients."),
    Term("momentum", "A running mean of gradients that smooths the steps."),
    Term("the learning rate", "The size of the optimizer's steps."),
    Term("warmup", "The first steps, in which the learning rate rises from zero."),
    Term("a cosine schedule", "A learning rate that falls along half a cosine."),
    Term("weight decay", "Shrinking the weights a little at every step."),
    Term("gradient clipping", "Scaling the gradient down when its norm is above a limit."),
    Term("gradient accumulation", "Adding up the gradients of several micro-batches before one step."),
    Term("gradient checkpointing", "Computing activations again in the backward pass to save memory."),
    Term("an activation", "An intermediate output of a layer."),
    Term("a batch", "The rows that one optimizer step learns from."),
    Term("a micro-batch", "The rows that a device handles at once."),
    Term("an epoch", "One pass over all training rows."),
    Term("a step", "One update of the weights by the optimizer."),
    Term("a seed", "The number that fixes a run's random choices."),
    Term("a checkpoint", "A saved state of a run or a model."),
    Term("throughput", "The tokens or rows handled in a second."),
    Term("MFU", "The share of a device's peak arithmetic that a model uses.", "model FLOPs utilization"),
    Term("a FLOP", "One addition or multiplication of two numbers.", "floating-point operation"),
    Term("OOM", "The error of a device whose memory is full.", "out of memory"),
)

_MODELS = (
    Term("a transformer", "A network of attention and feed-forward layers."),
    Term("attention", "The layer in which each token gathers information from other tokens."),
    Term("a causal mask", "The rule that a token may attend only to itself and earlier tokens."),
    Term("an attention head", "One of the parallel parts that attention is split into."),
    Term("MHA", "Attention whose heads each have their own keys and values.", "multi-head attention"),
    Term("GQA", "Attention in which groups of query heads share keys and values.", "grouped-query attention"),
    Term("MQA", "Attention in which all query heads share one key and value head.", "multi-query attention"),
    Term("FlashAttention", "An exact attention kernel that never stores the whole score matrix."),
    Term("a KV cache", "Stored keys and values that spare work while generating."),
    Term("RoPE", "Positions encoded by rotating queries and keys.", "rotary position embedding"),
    Term("RMSNorm", "A norm that divides by the root mean square.", "root mean square layer normalization"),
    Term("an MLP", "The feed-forward part of a transformer layer.", "multilayer perceptron"),
    Term("SwiGLU", "A feed-forward layer whose SiLU branch gates a second branch."),
    Term("an MoE", "A model whose router sends each token to a few experts.", "mixture of experts"),
    Term("a residual connection", "A path that adds a layer's input to its output."),
    Term("an embedding", "The vector that stands for a token."),
    Term("tied embeddings", "One matrix used both for input embeddings and for the output head."),
    Term("a language model head", "The layer that turns hidden states into logits."),
    Term("logits", "The raw scores of the vocabulary before the softmax."),
    Term("softmax", "The function that turns scores into probabilities."),
    Term("the hidden size", "The length of the vector that a layer passes on for each token."),
    Term("a parameter", "One trained number of a model."),
    Term("an LLM", "A model with billions of weights that predicts the next token.", "large language model"),
    Term("the context length", "The most tokens that a model can take at once."),
    Term("a base model", "A pretrained model that has not been tuned to follow instructions."),
    Term("safetensors", "A file format for tensors that cannot run code when loaded."),
    Term("GGUF", "The file format of llama.cpp's models."),
)

_ADAPTERS = (
    Term("PEFT", "Training few weights while most stay frozen.", "parameter-efficient fine-tuning"),
    Term("LoRA", "Training two small matrices whose product is added to a frozen weight.", "low-rank adaptation"),
    Term("QLoRA", "LoRA on a base model whose weights are held in 4 bits.", "quantized low-rank adaptation"),
    Term("DoRA", "LoRA with the weight's magnitude trained apart.", "weight-decomposed low-rank adaptation"),
    Term("rsLoRA", "LoRA scaled by the square root of the rank.", "rank-stabilized LoRA"),
    Term("an adapter", "A small set of trained weights beside a frozen model."),
    Term("rank", "The inner dimension of LoRA's two matrices."),
    Term("alpha", "The number that, divided by the rank, scales LoRA's update."),
    Term("merging", "Adding an adapter's update into the base weights."),
    Term("freezing", "Keeping weights as they are during training."),
    Term("full fine-tuning", "Training every weight of a model."),
    Term("quantization", "Storing weights in fewer bits."),
    Term("NF4", "A 4-bit format whose levels suit normally distributed weights.", "4-bit NormalFloat"),
    Term("double quantization", "Quantizing the scales of quantized weights as well."),
    Term("mixed precision", "Doing most arithmetic in 16 bits while keeping float32 weights."),
    Term("BF16", "A 16-bit number format with the range of float32.", "brain floating point, 16 bits"),
    Term("FP16", "A 16-bit number format with a small range, which needs loss scaling.", "16-bit floating point"),
    Term("loss scaling", "Multiplying the loss so that small FP16 gradients do not vanish."),
)

_TEXT = (
    Term("a token", "The unit of text that a model reads."),
    Term("a tokenizer", "The program that turns text into tokens and back."),
    Term("a vocabulary", "All tokens that a tokenizer knows."),
    Term("BPE", "A tokenizer that merges frequent neighbours into tokens.", "byte-pair encoding"),
    Term("a special token", "A token with a role of its own, such as the end of a turn."),
    Term("BOS", "The token that starts a text.", "beginning of sequence"),
    Term("EOS", "The token that ends a text.", "end of sequence"),
    Term("padding", "Filler tokens that bring rows to one length."),
    Term("packing", "Putting several rows into one sequence to save padding."),
    Term("truncation", "Cutting off the tokens beyond a limit."),
    Term("a chat template", "The Jinja program that turns a conversation into text."),
    Term("ChatML", "A chat format that marks each turn's start with its role and its end.", "Chat Markup Language"),
    Term("a system prompt", "The message that sets how the assistant should behave."),
    Term("a loss mask", "The choice of the tokens that count in the loss."),
    Term("a label", "The token that should be predicted at a position."),
    Term("a document mask", "Attention kept within each document of a pack."),
    Term("a collator", "The code that joins rows into a batch."),
    Term("streaming", "Reading rows as they are needed, without storing the data set first."),
    Term("a shard", "One of the pieces that a data set or a weight is split into."),
    Term("deduplication", "The removal of rows that stand in the data more than once."),
    Term("synthetic data", "Training rows that a program or a model wrote."),
    Term("a prompt", "The text that a model is asked to continue or answer."),
)

_USE = (
    Term("inference", "The use of a trained model."),
    Term("greedy decoding", "Always taking the most probable next token."),
    Term("sampling", "Drawing the next token at random by its probability."),
    Term("temperature", "The number that divides logits before sampling; low values mean less variety."),
    Term("top-p", "Sampling from the fewest tokens whose probabilities add up to p."),
    Term("top-k", "Sampling from the k most probable tokens."),
    Term("beam search", "Decoding that keeps the several best partial texts."),
    Term("speculative decoding", "A small model proposes tokens that the large one checks at once."),
    Term("exact match", "The share of answers that equal their references."),
    Term("a benchmark", "A fixed task on which models are compared."),
    Term("a hallucination", "A fluent answer that is not true."),
    Term("RAG", "Answers written with passages found by a search.", "retrieval-augmented generation"),
    Term("a tool call", "A model's request that a program run a function."),
)

_SCALE = (
    Term("DDP", "Every device holds the whole model and gradients are averaged.", "distributed data parallel"),
    Term("FSDP", "Weights, gradients and optimizer state are split over devices.", "fully sharded data parallel"),
    Term("ZeRO", "DeepSpeed's splitting of training state over devices.", "zero redundancy optimizer"),
    Term("DeepSpeed", "Microsoft's library for training large models."),
    Term("tensor parallelism", "Splitting single matrices over devices."),
    Term("pipeline parallelism", "Giving different layers to different devices."),
    Term("sequence parallelism", "Splitting the positions of a row over devices."),
    Term("all-reduce", "The sum of a tensor over all devices, given to each of them."),
    Term("NCCL", "NVIDIA's library for communication between GPUs.", "NVIDIA collective communications library"),
    Term("the world size", "The number of processes in a distributed run."),
    Term("process rank", "The number of a process in a distributed run."),
    Term("offloading", "Moving weights or optimizer state to slower memory."),
    Term("a TPU", "Google's chip for machine learning.", "tensor processing unit"),
    Term("HBM", "The fast memory beside a GPU's chip.", "high-bandwidth memory"),
)

GLOSSARY: tuple[Term, ...] = _LEARNING + _STEPS + _MODELS + _ADAPTERS + _TEXT + _USE + _SCALE
