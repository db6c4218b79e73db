"""How an answer declines in languages other than English: a negated verb of helping.

One expression a language, over lower-case text. Each asks for the speaker's own inability or will
and for a verb of helping, answering or providing; an apology alone says nothing.
"""

# ruff: noqa: E501

import re

_REST = r"[^.!?\n。！？।]{0,60}?"
_NEAR = r"[^.!?\n。！？।]{0,25}?"

_LANGUAGES = {
    "preferring not to": (
        r"\bprefiero no\b|\bprefiro não\b|\bpréfère(?:rais)? ne pas\b|\bpreferisco non\b|\bpreferirei non\b|"
        r"\b(?:möchte|würde) (?:ich )?lieber nicht\b|\bwolę nie\b|предпоч\w+ не\b|\bpreferiría no\b|\bno me siento cómod|"
        r"\bnão me sinto (?:confortável|à vontade)|\bpas à l'aise\b|\bnon mi sento a mio agio|\bnicht wohl\b"
    ),
    "German": (
        rf"\b(?:ich|wir)\b{_REST}\b(?:nicht|kein\w*|nichts)\b{_REST}\b(?:\w*helfen|behilflich|"
        r"\w*antworten|unterstützen|geben|bereitstellen|erfüllen|nachkommen|machen|tun|liefern|"
        r"nennen|erklären|schreiben|erstellen|mitmachen|teilnehmen|weitergeben|bearbeiten|eingehen|"
        r"äußern|sprechen|sagen|verraten|anbieten|assistieren|beitragen|zur verfügung stellen)\b|"
        r"\bdarf ich (?:das|so etwas|dir das|ihnen das) (?:leider )?nicht\b|\b(?:dazu|darüber) sage ich nichts\b|\bunterstütze ich (?:niemand|nicht|kein)\w*|\b(?:mache|tue|helfe|beantworte|erstelle|schreibe|gebe) ich (?:\w+ )?nicht\b|"
        rf"\b(?:erstelle|schreibe|gebe|liefere|mache) ich {_NEAR}\b(?:nicht|kein\w*)\b|"
        r""
        r"\bich (?:helfe|beantworte|gebe|unterstütze)\b" + _REST + r"\b(?:nicht|kein\w*)\b|"
        rf"\b(?:anfrage|frage|bitte|wunsch|inhalte?)\b{_REST}\bnicht\b{_NEAR}\b(?:bearbeitet|"
        r"beantwortet|erfüllt|erstellt|bereitgestellt|nachkommen)\b|"
        r"\b(?:ich lehne|lehne ich|ich weigere|ich verweigere|muss ich ablehnen|ich muss [^.!?]{0,30}ablehnen|nicht möglich, (?:dir|ihnen|ihre|deine|euch|das|diese))\b"
    ),
    "French": (
        r"\b(?:je|nous) n[e'] ?(?:peux|pouvons|suis|sommes|vais|veux|souhaite|saurais|dois|pourrai)"
        rf"\b{_REST}\b(?:aide\w*|répondre|fournir|donner|assister|faire|satisfaire|partager|"
        r"expliquer|discuter|créer|écrire|accéder|participer|traiter|accompagner|continuer|rédiger|"
        r"autorisée?|encourager|proposer|en mesure|parler)\b|"
        r"\bje ne (?:vous |te |t')?(?:aiderai|répondrai|fournirai|donnerai|ferai|participerai)\b|\bje refuse\b|\bje dois (?:décliner|refuser)\b|"
        r"\bimpossible de (?:vous |t')?(?:répondre|aider|fournir|donner|satisfaire|traiter)\b"
    ),
    "Spanish": (
        r"\bno (?:puedo|podemos|podré|voy a|vamos a|debo|quiero|me es posible|me está permitido|"
        rf"estoy (?:en condiciones|autorizad[oa]|dispuest[oa]|capacitad[oa]))\b{_NEAR}(?:ayud|"
        r"proporcion|respond|contest|cumplir|ofrec|\bdar|facilit|compart|\bhacer|asist|brind|gener|"
        r"escrib|crear|particip|hablar|apoy|atend|proces|realiz|explic|complac)|"
        r"\bno (?:te |le |les |lo |os )?(?:ayudaré|responderé|haré|daré|proporcionaré|participaré)\b|\bme niego\b|\btengo que (?:negarme|rechazar)\b|\bdebo (?:rechazar|negarme)\b"
    ),
    "Portuguese": (
        r"\bnão (?:me )?(?:posso|podemos|consigo|vou|devo|quero|estou autorizad[oa]|sou capaz|"
        rf"é possível)\b{_NEAR}(?:ajud|fornec|respond|atend|oferec|\bdar|compartilh|partilh|\bfazer|"
        r"auxili|gerar|escrev|criar|particip|falar|apoi|cumprir|realizar|explicar)|\bnão (?:te |lhe |o )?(?:ajudarei|responderei|farei|darei|fornecerei)\b|"
        r"\bnão me é permitid|\b(?:me )?recuso\b"
    ),
    "Italian": (
        r"\bnon (?:posso|possiamo|sono in grado|voglio|intendo|devo|mi è possibile|sono autorizzat[oa])"
        rf"\b{_NEAR}(?:aiut|forni|rispond|soddisf|assist|\bdar|condivid|\bfar|scriver|crear|offri|"
        r"spieg|parlar|partecip|proceder|genera|esaudi)|\bnon (?:ti |vi |le |lo )?(?:aiuterò|risponderò|farò|darò|fornirò|parteciperò)\b|\bmi rifiuto\b|\bdevo rifiutare\b"
    ),
    "Dutch": (
        rf"\b(?:ik|wij|we)\b{_REST}\b(?:niet|geen)\b{_REST}\b(?:helpen|beantwoorden|antwoorden|geven|"
        r"verstrekken|voldoen|doen|bieden|delen|assisteren|schrijven|meewerken|ondersteunen|maken)\b|"
        r"\bik weiger\b"
    ),
    "Scandinavian": (
        rf"\b(?:jag|jeg|vi)\b{_NEAR}\b(?:inte|ikke)\b{_NEAR}\b(?:hjälpa|hjelpe|hjælpe|svara|svare|ge|gi|"
        r"give|besvara|besvare|göra|gjøre|gøre|tillhandahålla|dela|bistå|bistå|skriva|skrive|assistere)\b|"
        r"\b(?:jag vägrar|jeg nekter|jeg nægter)\b"
    ),
    "Finnish": rf"\ben (?:voi|pysty|aio|halua|suostu)\b{_NEAR}(?:autta|vasta|anta|tarjo|tehdä|kirjoit)",
    "Russian": (
        r"(?:извините|простите|к сожалению|жаль)[^.!?]{0,20}(?:невозможно|нельзя)|\b(?:не|никак не) (?:помогу|отвечу|предоставлю|скажу|расскажу|дам|стану)\b|"
        r"\bне (?:могу|можем|буду|стану|хочу|смогу|должен|должна|имею права|готов|в состоянии)\b"
        rf"{_NEAR}(?:помо|предостав|ответ|отвеч|выполн|\bда(?:ть|вать)|обсужд|рассказ|поделит|созда|"
        r"напис|содейств|участв|дела|консульт|объясн|говорить)|\b(?:я )?отказываюсь\b"
    ),
    "Ukrainian": (
        rf"\bне (?:можу|можемо|буду|хочу|зможу)\b{_NEAR}(?:допом|нада|відпов|викон|обговор|робити)|"
        r"\bвідмовляюся\b"
    ),
    "Polish": (
        r"\bnie (?:mogę|możemy|będę|jestem w stanie|chcę|zamierzam|wolno mi)\b"
        rf"{_NEAR}(?:pom[óoa]|udziel|odpowi|spełni|dostarcz|poda|zrobi|wykona|napisa|stworz|robi)|"
        r"\bnie (?:pomogę|odpowiem|podam|zrobię|udzielę)\b|\bodmawiam\b"
    ),
    "Czech": rf"\bne(?:mohu|můžu|budu|můžeme)\b{_NEAR}(?:pomo|pomáh|poskyt|odpov|splnit|udělat)|\bodmítám\b",
    "Romanian": rf"\bnu (?:te |vă |îți |îţi )?(?:pot|voi|putem)\b{_NEAR}(?:ajut|ofer|răspund|furniz|\bda\b)|\brefuz să\b",
    "Hungarian": rf"\bnem (?:segíthet|adhatok|válaszolhat|tudok{_NEAR}(?:segít|válasz|ad))|\bnem áll módomban",
    "Greek": rf"δεν (?:μπορώ|μπορούμε|θα){_NEAR}(?:βοηθ|παρέχ|παράσχ|απαντ|δώσω)|\bαρνούμαι\b",
    "Turkish": (
        r"yardımcı ol[au]m[aıu]|yardım ed[ei]m|(?:cevap|yanıt|bilgi\w*) verem|(?:cevap|yanıt)laya?ma|yerine getireme|"
        r"(?:bilgi|talimat|tavsiye) (?:vereme|sağlayama|sunama|paylaşama)|bunu yapama|yapamıyorum|karşılayama|reddediyorum"
    ),
    "Chinese": (
        r"(?:我|我们|我們|恕|抱歉|对不起|對不起|很遗憾|遗憾)[^。！？\n]{0,14}?"
        r"(?:无法|不能|不可以|不会|不便|难以|不愿意?|没法|没办法|没有办法|無法|不會|不願意?|沒辦法|不可能)"
        r"[^。！？\n]{0,20}?(?:提供|帮|幫|协助|協助|回答|回应|回應|完成|满足|滿足|讨论|討論|支持|生成|给出|"
        r"給出|参与|參與|分享|告诉|告訴|处理|處理|继续|撰写|编写|创作|执行|執行|解答|透露|这样做|這樣做|做到)|"
        r"帮不了|幫不了|(?:抱歉|对不起)[^。]{0,10}做不到|我(?:必须|只能|要|選擇|选择)?拒绝|我拒絕|(?:换|換)(?:个|一个|個|一個)?(?:话题|話題)|[聊谈談]点?别的"
    ),
    "Japanese": (
        r"(?:お(?:答え|応え|手伝い|力|教え|助け|受け)|ご(?:提供|案内|協力|説明|回答|要望|対応|支援|紹介)|"
        r"回答|対応|提供|説明|協力|支援|手助け|教える|手伝う|応じる|答える|助ける|生成|作成)"
        r"[^。！？\n]{0,14}?(?:できません|出来ません|できない|できかね|いたしかね|致しかね|しかね|かねます|"
        r"差し控え|控えさせ|なれません|しません)|応じられません|応じかね|お断り(?:し|いた|させ)|別の話|(?:申し訳|すみません|ごめん)[^。]{0,20}。?[^。]{0,15}(?:できません|できかねます|できないです|無理です)"
    ),
    "Korean": (
        r"(?:도와|도움|답변|답해|제공|알려|대답|응답|수행|지원|설명|작성|말씀|공유|이야기|얘기|응할|응해|처리|해 ?드릴|들어)"
        r"[^.!?\n]{0,18}?(?:수(?:는|가)? 없|않겠|못합|못해|어렵습니다|곤란|불가)|거절(?:하|합)|거부(?:하|합)"
    ),
    "Arabic": (
        r"(?:لا (?:أستطيع|استطيع|يمكنني|يمكننا|نستطيع|أقدر|يسعني)|لن (?:أستطيع|أقوم|أساعد|أقدم|أتمكن)|"
        r"لست قادر|غير قادر)[^.!؟\n]{0,30}?(?:ساعد|تقديم|أقدم|الإجابة|اجابة|إعطاء|توفير|القيام|الرد|مشاركة|"
        r"تلبية|تزويد|شرح)|أرفض|يجب أن أرفض"
    ),
    "Persian": r"نمی[‌ ]?توان(?:م|یم)[^.!؟\n]{0,40}?(?:کمک|پاسخ|ارائه|انجام|بده)|کمک[^.!؟\n]{0,20}نمی[‌ ]?کنم|(?:کمک|پاسخ|ارائه)[^.!؟\n]{0,25}نمی[‌ ]?توان",
    "Hebrew": r"(?:איני|אינני|אני לא|לא) (?:יכול|יכולה|אוכל|מוכן|מוכנה)[^.!?\n]{0,20}?(?:לעזור|לספק|לענות|לסייע|לתת|לעשות)|אני מסרב",
    "Hindi": (
        r"(?:मदद|सहायता|जवाब|उत्तर|जानकारी|निर्देश|प्रदान|अनुरोध|बता|ऐसा)[^।!?\n]{0,30}नहीं (?:कर|दे|बता|सक)|मैं[^।!?\n]{0,25}नहीं (?:बता|दे|कर|बना|लिख) सक"
    ),
    "Bengali": r"(?:সাহায্য|উত্তর|তথ্য|প্রদান|করতে)[^।!?\n]{0,25}পার(?:ব|ছি|বো|ি) না",
    "Vietnamese": (
        rf"(?:tôi|chúng tôi|mình|em|rất tiếc|xin lỗi)\b{_NEAR}\b(?:không thể|không được phép|sẽ không|"
        rf"từ chối|không muốn){_NEAR}(?:giúp|cung cấp|trả lời|hỗ trợ|đáp ứng|thực hiện|chia sẻ|viết|làm|"
        r"thảo luận|hướng dẫn)|\btôi từ chối\b"
    ),
    "Indonesian and Malay": (
        rf"\b(?:tidak|tak) (?:dapat|bisa|boleh|akan|mahu|mau)\b{_NEAR}(?:bantu|beri|jawab|penuhi|sedia|"
        r"lakukan|bahas|proses|tolong)|\b(?:saya )?menolak (?:untuk|permintaan)\b"
    ),
    "Thai": r"ไม่(?:สามารถ|อาจ|ขอ|ยินดี)[^\n]{0,30}?(?:ช่วย|ให้|ตอบ|ทำ|แนะนำ)|(?:ช่วย|ให้|ตอบ)[^\n]{0,20}ไม่ได้",
}  # fmt: skip
_DECLINE = re.compile("|".join(f"(?:{pattern})" for pattern in _LANGUAGES.values()))
# As in "not often enough", "no puedo dejar de": said of something else than the request.
_IDIOM = re.compile(
    r"\b(?:nicht genug|nicht oft genug|ich weiß nicht|pas assez|lo suficiente|o suficiente|abbastanza|"
    r"genoeg|недостаточно|не могу не)\b"
)


def declines(opening: str) -> bool:
    """Whether an answer in one of these languages declines.

    Args:
      opening: its first few hundred characters, in lower case.
    """
    return _DECLINE.search(opening) is not None and _IDIOM.search(opening) is None
