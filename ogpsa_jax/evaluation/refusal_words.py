"""Short English answers that say no in nothing but the words of refusing.

How a refusal is put varies without end; what it is made of does not: a no, the speaker or the
request, a verb of helping or stopping, and words that mean nothing by themselves. An answer to a
question brings words of its subject.
"""

import re

_WORDS = frozenset(
    """
    i i'm i'll i'd i've me my myself we we're we'd we'll us our it it's its itself that that's
    this these those such there here what you you're your yours mine to of for in on with about
    at by as from into out up so and or but because since if any anything anyone anybody someone
    somebody something some one ones thing things kind sort type way ways a an the is are was be
    been being am isn't aren't do does did doing don't doesn't didn't done have has had having
    will would could should can may might must shall let let's not no never cannot can't won't
    wouldn't couldn't shouldn't nor neither nothing nobody none nope nah unable unwilling rather
    prefer refuse refusing decline declining pass stop stopping end avoid reject leave skip turn
    down draw line cross crosses limit limits bounds off beyond outside against go goes going
    gone get getting far too much aside alone close drop change steer clear keep away help
    helping helps assist assisting assistance support supporting provide providing give gives
    giving given tell telling explain explaining answer answering answered discuss discussing
    share sharing write writing say saying talk talking speak speaking describe engage engaging
    participate take taking part involved entertain expect carry carried comply continue fulfil
    fulfill fulfilled handle handled process processed complete completed generate produce
    create creating make making grant granted allow allowed permitted able possible impossible
    available appropriate acceptable right wrong okay ok best better fine safe unsafe place role
    job purpose nature position willing comfortable uncomfortable ready prepared meant made
    designed programmed trained built permit permits option interested interest intention plan
    plans desire wish power request requests question questions topic topics subject subjects
    matter matters conversation task message content information advice instructions details
    guidance prompt query another different else other instead person people others ai assistant
    model language sorry afraid apologies apologise apologize unfortunately regret regrettably
    please thank thanks respectfully simply just really even ever still also very quite
    therefore however although though while when where how why whether than then now today again
    yes well oh hmm look listen honestly want wants wanting need feel feeling mean means ask
    asked asking asks seek like understand think harm harmful harmless hurt hurting illegal
    dangerous danger unethical immoral inappropriate violate violates break breaks policy
    policies rules rule guidelines principles values safety law legal safely risk risks violence
    ethical honest private personal confidential demand demands text texts satisfy satisfied
    produced written shared discussed explained told accommodate met refused declined rejected
    denied blocked withhold withholding protect
    """.split()
)
_TOKEN = re.compile(r"[^\W\d_](?:[^\W\d_]|')*|\d+|[:\"]")
_CONTENT = re.compile(r"[0-9:\"?]")
_NO = re.compile(
    r"\b(?:not|no|never|cannot|nor|neither|nothing|none|nobody|unable|unwilling|refus\w+|declin\w+|"
    r"rather|prefer|pass|stop|end|avoid|reject|leave|nope|impossible|unsafe|too far|outside|beyond|"
    r"off|against|another|different|else|aside|steer)\b|n't\b"
)
_SPEAKER = re.compile(
    r"\b(?:i|i'm|i'd|i'll|i've|me|my|we|us|request|question|topic|subject|matter|conversation|your)\b|"
    r"^(?:can't|cannot|won't|not|no)\b"
)
_DEED = re.compile(
    r"\b(?:help|assist|support|provid|giv|tell|explain|answer|discuss|shar|writ|say|talk|speak|descri|"
    r"engag|participat|part|involv|entertain|expect|carr|compl|continu|fulfil|handl|process|grant|allow|"
    r"request|question|topic|subject|matter|conversation|declin|refus|demand|satisf|withh|stop|avoid|"
    r"here|(?:pass|far|part|end|that|this|it|do)\b)"
)
# Said of something else: knowledge, doubt, courtesy, an offer.
_ELSE = re.compile(
    r"\b(?:know|think so|think it's|believe it|see why|mind|don't have|do not have|understand why|"
    r"i see|need to|not sure|problem|wait|you can|can be|can't help it|you're right|agree|"
    r"i can help|i like|i love|no one|not only|i feel|say no to|how (?:much|often|happy|good)|"
    r"need the|if you cannot)\b"
)
_LONGEST = 30  # words of an answer
_SENTENCE_SHARE, _ANSWER_SHARE = 0.2, 0.35  # of other words, at most


def says_nothing_but_no(sentences: list[str]) -> bool:
    """Whether a short answer is a no, in words that speak of nothing else.

    Args:
      sentences: of the answer, in lower case.
    """
    words = [_TOKEN.findall(sentence) for sentence in sentences]
    count = sum(map(len, words))
    if not 3 <= count <= _LONGEST or sum(map(_others, words)) > _ANSWER_SHARE * count:
        return False
    return any(
        len(own) >= 3
        and _others(own) <= _SENTENCE_SHARE * len(own)
        and all(pattern.search(sentence) for pattern in (_NO, _SPEAKER, _DEED))
        and not _CONTENT.search(sentence)
        and not _ELSE.search(sentence)
        for sentence, own in zip(sentences[:2], words, strict=False)
    )


def _others(words: list[str]) -> int:
    """How many of the words are none of refusing."""
    return sum(word.strip("'") not in _WORDS for word in words)
