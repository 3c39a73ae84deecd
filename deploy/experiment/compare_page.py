"""The comparison's page, as a Jinja template; its style is the report's."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}: comparison of strategies</title>
<style>{{ style }} figure svg { max-width: none; } .wide td, .wide th { white-space: nowrap; }</style>
</head>
<body>
<main>
<header>
<p class="muted">Comparison of strategies</p>
<h1>{{ name }}</h1>
{% if missing %}
<div class="status failed" role="alert"><p><strong>{{ missing }} of {{ wanted }} runs are not there.</strong></p>
<p>They failed, or have not been run; what they would show is left out.</p></div>
{% endif %}
{% for sentence in headline %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
<nav aria-label="On this page"><ul>
{% for anchor, title in contents %}
<li><a href="#{{ anchor }}">{{ title }}</a></li>
{% endfor %}
</ul></nav>
</header>

<section>
<h2 id="result">Result on the test set</h2>
{% for note in notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% for group in groups %}
{% for title, heads, rows in group.tables %}
<div class="scroll wide" tabindex="0" role="region" aria-label="{{ title }}"><table>
<caption><strong>{{ title }}</strong></caption>
<thead><tr>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0][0] }}</th>
{% for text, best in row[1:] %}<td>{% if best %}<strong>{{ text }}</strong>{% else %}{{ text }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endfor %}
<ul class="note">
{% for score in scores %}
<li>{{ score.title }}: {{ score.meaning }}.</li>
{% endfor %}
<li>Moved: tensors up and down. Seconds: the slowest site's training and the server's combining; no transport, all sites
at once.</li>
<li>At equal bytes: every strategy at its last evaluation within the bytes that the thriftiest one moved in its whole
run. Where evaluations are far apart it may have moved much less.</li>
</ul>
</section>

<section>
<h2 id="curves">Round by round</h2>
<p>On the test set, against rounds, bytes and time: the mean over the seeds, with a band of one standard deviation.</p>
{% for group in groups if group.curves %}
<h3>{{ group.title }}</h3>
{% for svg, caption in group.curves %}
<figure>{{ svg }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% endfor %}
</section>

{% if any_diagnostics %}
<section>
<h2 id="updates">What the updates looked like</h2>
<p>Means over layer groups and seeds; a strategy that does not report a number is left out.</p>
<ul class="note">
{% for title, meaning in meanings %}
<li>{{ title }}: {{ meaning }}.</li>
{% endfor %}
</ul>
{% for group in groups if group.diagnostics %}
<h3>{{ group.title }}</h3>
<figure>{{ group.diagnostics }}</figure>
{% endfor %}
</section>
{% endif %}

{% if partitions %}
<section>
<h2 id="partitions">Who holds what</h2>
<p>Rows by label and site, counted from the sites' shards; a dot's area is the number.</p>
{% for title, svg, held in partitions %}
<h3>{{ title }}</h3>
<figure style="max-width: {{ 10 + 2.2 * held.sites|length }}rem">{{ svg }}</figure>
<details><summary>The numbers</summary>
<div class="scroll" tabindex="0" role="region" aria-label="{{ title }}"><table>
<thead><tr><th scope="col">Site</th>
{% for label in held.labels %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead>
<tbody>
{% for site, counts in held.sites.items() %}
<tr><th scope="row">{{ site }}</th>
{% for label in held.labels %}<td>{{ counts.get(label, 0)|whole }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
{% endfor %}
</section>
{% endif %}

{% if samples %}
<section>
<h2 id="answers">The same questions</h2>
<p>From the test set; {{ samples_title }}, the first seed of each strategy.</p>
{% for sample in samples %}
<article class="sample">
<h3 class="text">{{ sample.prompt }}</h3>
<dl>
{% for who, text in sample.answers %}
<div><dt>{{ who }}{% if not loop.first and text.strip() == sample.expected.strip() %}
<strong class="better">= expected</strong>{% endif %}</dt>
<dd class="text">{% if text.strip() %}{{ text }}{% else %}<em class="muted">(empty)</em>{% endif %}</dd></div>
{% endfor %}
</dl>
</article>
{% endfor %}
</section>
{% endif %}
</main>
</body>
</html>
"""
