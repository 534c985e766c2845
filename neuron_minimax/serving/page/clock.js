// The times of an answer: shown while it runs, summed up when it has ended.

const TICK = 100;  // milliseconds between two times of a running answer

/** Starts when it is made, and writes into the view's line. */
export class Clock {
  #view;
  #start = performance.now();
  #first = 0;
  #last = 0;
  #pieces = 0;
  #timer;

  constructor(view) {
    this.#view = view;
    this.#timer = setInterval(() => this.#show(), TICK);
    this.#show();
  }

  piece() {
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#pieces += 1;
  }

  end(words, tokens = 0) {
    clearInterval(this.#timer);
    const whole = seconds(performance.now() - this.#start);
    const rate = tokens > 1 && this.#last > this.#first ? `, ${perSecond(tokens - 1, this.#last - this.#first)}` : "";
    const first = this.#first ? ` (the first after ${seconds(this.#first - this.#start)})` : "";
    const count = tokens === 1 ? "1 token" : `${tokens} tokens`;
    this.#view.rate([tokens ? `${count} in ${whole}${first}${rate}.` : `${whole}.`, words].join(" ").trim());
  }

  #show() {
    const now = performance.now();
    const time = seconds(now - this.#start);
    const rate = this.#pieces > 1 ? `, about ${perSecond(this.#pieces - 1, this.#last - this.#first)}` : "";
    this.#view.rate(this.#first ? `${time}${rate}` : `Waiting for the first token, ${time}`, true);
  }
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(1)} s`;
}

function perSecond(count, milliseconds) {
  return `${(count / Math.max(milliseconds, 1) * 1000).toFixed(1)} tokens/s`;
}
